"""What the same weight is called in every dialect."""
