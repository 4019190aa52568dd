"""What a study compares: its file, its arms, its cells."""
