"""Plans: a backend chosen, and the call."""
