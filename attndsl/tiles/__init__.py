"""Masks in tiles, found without looking at every one."""
