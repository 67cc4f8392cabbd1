"""One command that checks this code on a GPU in under five minutes; each step in a process of its own."""
