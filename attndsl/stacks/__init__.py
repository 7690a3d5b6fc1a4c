"""Layers of attentions: what a `stack` is, how it is read, and what is made of it."""
