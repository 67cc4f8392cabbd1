"""One training step, the counters and totals around it, and requests to stop."""
