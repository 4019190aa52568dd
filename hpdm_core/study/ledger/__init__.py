"""The study's record of its cells, as Optuna trials, and the lock on its folder."""
