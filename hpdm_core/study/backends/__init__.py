"""Backends, which run cells: in this process, in other processes of this machine, on SLURM, or simulated."""
