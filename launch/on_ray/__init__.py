"""Training on a Ray cluster. Only this folder imports ray."""
