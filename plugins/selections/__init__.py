"""Selections: what chooses keys by content, one file each."""
