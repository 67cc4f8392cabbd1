"""`python -m launch.slurm` submits jobs; `plan` and `requeue` make the decisions of the batch scripts."""
