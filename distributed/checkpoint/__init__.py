"""Checkpoints: written, resumed from, uploaded and downloaded."""
