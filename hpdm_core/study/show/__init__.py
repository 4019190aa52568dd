"""What a study says of itself without running: its costs, its state, its report."""
