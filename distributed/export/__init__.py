"""Exports a trained network to formats that run without this package."""
