"""Numbers within their bounds: what is no number, or lies beyond them, is one sentence."""

from __future__ import annotations

import math

import pytest

from tinygptv.bounds import check_number

INF = math.inf


@pytest.mark.parametrize(
    ("value", "bounds", "whole"),
    [(2, (2,), True), (2, (2,), False), (7, (2, 7), True), (2.0, (2, 7), False), (7.0, (2, 7), False),
     (-3, (-3, -1), True), (1e300, (0,), False), (10**30, (0,), True)],
)  # fmt: skip
def test_both_ends_belong_to_the_bounds(value, bounds, whole):
    check_number("x", value, *bounds, whole=whole)


@pytest.mark.parametrize(
    ("value", "bounds", "whole", "told"),
    [
        (1, (2,), True, "x is 1; it must be a whole number of at least 2."),
        (1.9, (2,), False, "x is 1.9; it must be a number of at least 2."),
        (8, (2, 7), True, "x is 8; it must be a whole number from 2 to 7."),
        (7.01, (2.5, 7), False, "x is 7.01; it must be a number from 2.5 to 7."),
        (3.0, (2, 7), True, "x is 3.0; it must be a whole number from 2 to 7."),
        (True, (0, 1), False, "x is True; it must be a number from 0 to 1."),
        ("3", (0,), False, "x is '3'; it must be a number of at least 0."),
        (None, (-5,), True, "x is None; it must be a whole number of at least -5."),
        (math.nan, (0, 1), False, "x is nan; it must be a number from 0 to 1."),
        (INF, (0,), False, "x is inf; it must be a number of at least 0."),
        (-INF, (-INF,), False, "x is -inf; it must be a number of at least -inf."),
    ],
)
def test_what_is_beyond_them_or_no_number_is_told(value, bounds, whole, told):
    with pytest.raises(ValueError) as caught:
        check_number("x", value, *bounds, whole=whole)
    assert str(caught.value) == told
