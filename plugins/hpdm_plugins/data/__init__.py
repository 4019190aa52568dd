"""Built-in datasets and video readers."""
