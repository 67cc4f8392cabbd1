"""Checks this code on a GPU in about five minutes, each step in a process of its own."""
