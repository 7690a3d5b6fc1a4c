"""Words of stacks: how tokens leave layers, and what layers remember."""
