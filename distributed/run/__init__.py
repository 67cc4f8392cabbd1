"""The run folder: its files, its lock, and the checks before a resume. Imports no torch."""
