"""Scores as straight-line code: what of them is known before any pair (leaves), their derivatives (adjoints),
and the text of what is left for each pair (code), in the spelling of a target."""
