"""Experiment tracking: runs, what waits for the tracker, and the model registry."""
