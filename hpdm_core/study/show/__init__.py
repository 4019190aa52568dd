"""Commands that show a study without running it: its costs, its state, its report."""
