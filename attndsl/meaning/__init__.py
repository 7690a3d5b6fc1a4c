"""What a mask means, evaluated position by position."""
