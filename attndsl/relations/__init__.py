"""Masks as integer relations, and proofs about them."""
