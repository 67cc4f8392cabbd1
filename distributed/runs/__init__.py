"""Status and results of all runs in a folder. Imports no torch."""
