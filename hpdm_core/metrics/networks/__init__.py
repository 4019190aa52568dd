"""Networks that turn videos into features, and the files of their weights."""
