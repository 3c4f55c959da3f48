"""The outlines of the six shapes."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")


@lru_cache(maxsize=8)
def _base_outline(shape: str) -> np.ndarray:
    turn = np.linspace(0.0, 2 * math.pi, 48, endpoint=False)
    if shape == "circle":
        return np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "square":
        return np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    if shape == "triangle":
        return np.array([(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)])
    if shape == "star":
        points = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.5)
        return np.stack([radius * np.cos(points), radius * np.sin(points)], axis=1)
    if shape == "cross":
        a, b = 1.0, 0.38
        corners = [
            (-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b),
        ]  # fmt: skip
        return np.array(corners)
    x = 16 * np.sin(turn) ** 3
    y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return np.stack([x, -y], axis=1)


def outline(shape: str, angle: float) -> tuple[np.ndarray, float]:
    """A shape's outline after rotation.

    Returns:
        Vertices [n, 2] scaled so that their bounding box is the unit square, and that box's width over its height.
    """
    radians = math.radians(angle)
    rotation = np.array([[math.cos(radians), math.sin(radians)], [-math.sin(radians), math.cos(radians)]])
    vertices = _base_outline(shape) @ rotation
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    extent = high - low
    return (vertices - low) / extent, float(extent[0] / extent[1])
