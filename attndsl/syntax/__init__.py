"""Text to syntax tree and back."""

from attndsl.syntax.format import format as format
from attndsl.syntax.parse import Definitions as Definitions
from attndsl.syntax.parse import parse as parse
from attndsl.syntax.parse import parse_expression as parse_expression
from attndsl.syntax.parse import parse_partial as parse_partial
from attndsl.syntax.render import render as render
