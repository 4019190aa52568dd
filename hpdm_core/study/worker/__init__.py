"""What runs one cell in a process of its own."""
