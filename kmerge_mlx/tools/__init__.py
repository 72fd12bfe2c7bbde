"""What is made of, or measured on, a finished model."""
