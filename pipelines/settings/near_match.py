"""Suggests the name that a mistyped one probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def near_match(name: str, known: Collection[str]) -> str:
    """``did you mean 'x'?``, or the known names, in their order, where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
