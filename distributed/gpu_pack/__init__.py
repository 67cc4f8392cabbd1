"""Prepares what a machine with a GPU and no network needs (wheels, CIFAR-10, two commands), and collects its results."""
