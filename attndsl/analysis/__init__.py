"""What a pattern costs and what it can see, exactly."""
