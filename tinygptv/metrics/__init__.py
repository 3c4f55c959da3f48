"""Scores and their confidence intervals."""
