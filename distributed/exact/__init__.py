"""Exact mode: bit-identical results at any world size, from a fixed number of shards whose sums follow one tree."""
