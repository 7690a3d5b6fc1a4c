"""From the syntax tree to a typed Attention, and what is asserted and warned of."""
