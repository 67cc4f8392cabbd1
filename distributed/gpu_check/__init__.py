"""Checks this code on a GPU in less than five minutes, each step in a process of its own."""
