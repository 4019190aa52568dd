"""What is measured: distances between feature sets, the held-out loss, throughput, and the protocols they
state.
"""
