"""Benchmarks: workloads run as separate processes, in interleaved rounds, so that a noisy machine disturbs all of them."""
