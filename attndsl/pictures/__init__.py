"""Figures: masks, receptive fields, cost against length, turns of tokens."""

from attndsl.pictures.curves import cost as cost
from attndsl.pictures.leaving import turns as turns
from attndsl.pictures.masks import layers as layers
from attndsl.pictures.masks import mask as mask
from attndsl.pictures.masks import receptive_field as receptive_field
from attndsl.pictures.style import Drawing as Drawing
from attndsl.pictures.style import demand as demand
from attndsl.pictures.style import drawn as drawn
from attndsl.pictures.style import render as render
