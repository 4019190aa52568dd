"""What knows nothing of diffusion or studies: errors, files, processes, random streams."""
