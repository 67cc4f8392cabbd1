"""Training on a Ray cluster: driver, workers, and sweeps with Ray Tune. Ray is imported nowhere else."""
