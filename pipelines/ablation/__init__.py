"""Ablations: variants of the recipe, trained, scored and reported."""
