"""The life cycle of a command: standard streams, signals, logging and exits. Imports no torch."""
