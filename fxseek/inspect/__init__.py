"""What can be asked of a compiled model: explain, check, profile, estimate."""
