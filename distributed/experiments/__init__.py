"""Reproduces the eight results of the two reference implementations."""
