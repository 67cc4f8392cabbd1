"""`python -m launch.slurm`: submits jobs to Slurm, and decides for the batch scripts."""
