"""What follows the gradient: LAMB, the learning rate, the average of the weights."""
