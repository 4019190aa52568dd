"""Arms tuned by Optuna before they are compared."""
