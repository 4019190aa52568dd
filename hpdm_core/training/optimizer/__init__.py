"""Weight updates: the optimizer LAMB, the learning-rate schedule, the average of the weights."""
