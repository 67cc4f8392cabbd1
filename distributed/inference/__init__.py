"""A trained run in use: its network, its preprocessing and its confusion matrix."""
