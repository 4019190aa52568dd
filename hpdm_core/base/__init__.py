"""General helpers that do not depend on diffusion or studies: errors, files, processes, random streams."""
