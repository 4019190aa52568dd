"""Built-in coordinate samplers, noise scalings and samplers, objectives and solvers."""
