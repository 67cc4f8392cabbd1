"""Measurements that ship: whole processes side by side in interleaved rounds, so that a noisy machine hits all alike."""
