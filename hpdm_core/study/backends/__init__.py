"""Where cells run: in this process, in processes of this machine, on SLURM, or simulated."""
