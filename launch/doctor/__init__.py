"""`python -m launch.doctor` checks the nodes of a job before it trains."""
