"""Uses trained runs: the network with its preprocessing, and confusion matrices."""
