"""Metrics: distances between feature sets, the held-out loss, throughput, and the protocols of their values."""
