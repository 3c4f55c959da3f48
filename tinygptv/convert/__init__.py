"""Weights in other layouts: load them strictly, and write them.

``python -m tinygptv.convert`` is the command line; ``load_release`` is loaded on first use, with torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinygptv.convert.load import load_release

__all__ = ["load_release"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'tinygptv.convert' has no attribute {name!r}")
    return getattr(importlib.import_module("tinygptv.convert.load"), name)
