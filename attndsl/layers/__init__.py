"""Layers of attentions: what stacks of relations reach."""
