"""Optimizers, weight EMA, loss scaling and learning-rate schedules."""
