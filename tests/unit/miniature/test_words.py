"""Where objects are, at the borders of what is clear: among each other and in the image."""

from __future__ import annotations

import pytest

from tinygptv.miniature.scenes import SceneObject
from tinygptv.miniature.words import holds, on_side, only_one, place_of, relation_between, value_counts


def at(x, y, shape="circle"):
    """An object of a quarter of the image around a centre."""
    return SceneObject(shape, "red", "small", "plain", (x - 0.125, y - 0.125, x + 0.125, y + 0.125))


@pytest.mark.parametrize(
    ("first", "second", "relation", "inverse"),
    [
        ((0.25, 0.5), (0.75, 0.25), "left", "right"),
        ((0.5, 0.25), (0.25, 0.75), "above", "below"),
        ((0.25, 0.25), (0.75, 0.75), "left", "right"),  # as far in both directions
        ((0.25, 0.75), (0.75, 0.25), "left", "right"),
    ],
)
def test_objects_stand_to_each_other_along_the_axis_that_separates_them_most(first, second, relation, inverse):
    assert relation_between(at(*first), at(*second)) == relation
    assert relation_between(at(*second), at(*first)) == inverse


def test_a_tenth_of_the_image_is_clear_and_less_is_not():
    for direction, (x, y) in {"left": (1, 0), "right": (-1, 0), "above": (0, 1), "below": (0, -1)}.items():
        inverse = {"left": "right", "right": "left", "above": "below", "below": "above"}[direction]
        for lead, expected in ((0.125, True), (0.09375, None), (-0.09375, None), (-0.125, False)):
            first, second = at(0.5, 0.5), at(0.5 + x * lead, 0.5 + y * lead)
            assert holds(first, second, direction) is expected
            assert holds(second, first, inverse) is expected


def test_the_only_one_on_a_side_is_clear_and_alone():
    left, landmark, right = at(0.25, 0.5), at(0.5, 0.5), at(0.75, 0.5)
    assert only_one([left, landmark, right], 1, "left") == 0 and only_one([left, landmark, right], 1, "right") == 2
    assert only_one([left, landmark, right], 0, "right") is None, "two of them"
    assert only_one([left, landmark, right], 0, "left") is None, "none"
    assert only_one([left, landmark, right, at(0.5625, 0.5)], 1, "right") is None, "a second one may be there too"


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (0.25, 0.25, "at the top left"), (0.5, 0.25, "at the top"), (0.75, 0.75, "at the bottom right"),
        (0.25, 0.5, "on the left"), (0.75, 0.5, "on the right"), (0.5, 0.5, "in the middle"),
    ],
)  # fmt: skip
def test_every_object_has_a_place(x, y, place):
    assert place_of(at(x, y)) == place
    sides = {side: on_side(at(x, y), side) for side in ("left", "right", "above", "below")}
    assert (
        sides["left"] is {0.25: True, 0.5: None, 0.75: False}[x]
        and sides["below"] is {0.25: False, 0.5: None, 0.75: True}[y]
    )
    assert (sides["right"], sides["above"]) == tuple(
        None if s is None else not s for s in (sides["left"], sides["below"])
    )


def test_values_are_counted_in_the_order_of_their_names():
    """An order by hash would make other texts in each process."""
    shapes = ["square", "star", "circle", "triangle", "cross", "star"]
    counts = value_counts([at(0.5, 0.5, shape) for shape in shapes], "shape")
    assert list(counts.items()) == [("circle", 1), ("cross", 1), ("square", 1), ("star", 2), ("triangle", 1)]
