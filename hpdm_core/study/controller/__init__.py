"""What starts cells, follows them, and decides what comes after each ended."""
