"""Masks as integer relations: proofs, products, reach."""
