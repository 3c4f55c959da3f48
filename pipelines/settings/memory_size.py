"""Sizes of memory as they are written in settings: ``24GB``."""

from __future__ import annotations

import re


def parse_bytes(text: str) -> int:
    """Bytes of ``24GB``, ``8 GiB`` or ``80000MB``; a GB is 2**30, as makers of cards count.

    Raises:
        ValueError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG])i?B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no memory size: write it like 24GB.")
    return int(float(match[1]) * (2**30 if match[2].upper() == "G" else 2**20))
