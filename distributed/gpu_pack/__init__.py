"""Packs wheels, CIFAR-10 and two commands for a machine with a GPU and no network, and collects its results."""
