"""Several runs at a glance: where they are, how they stand and what they reached. Imports no torch."""
