"""Numbers in settings and recipes within their bounds: one sentence where they are not."""

from __future__ import annotations

import math


def check_number(name: str, value: object, least: float, most: float = math.inf, *, whole: bool = False) -> None:
    """Refuse a value that is no number, or outside of its bounds.

    Args:
        name: what the error calls it.
        value: to be checked.
        least: smallest value that is allowed.
        most: largest value that is allowed.
        whole: only whole numbers are allowed.

    Raises:
        ValueError: it is refused; names the value and the bounds.
    """
    number = math.nan  # within no bounds
    if isinstance(value, int | float) and not isinstance(value, bool) and not (whole and isinstance(value, float)):
        number = value
    if not least <= number <= most or math.isinf(number):
        kind = "a whole number" if whole else "a number"
        bounds = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} is {value!r}; it must be {kind} {bounds}.")
