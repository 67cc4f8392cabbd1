"""The life of a command: its streams, signals, log files and endings. Imports no torch."""
