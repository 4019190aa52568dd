"""Built-in metrics and feature extractors."""
