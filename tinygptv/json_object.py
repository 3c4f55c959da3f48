"""The type of a JSON object at the border of a file or a message."""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]
"""A JSON object as it was parsed, or as it will be written: keys and values are those of its format, which the function
that reads or writes it documents. Inside the packages, values have types of their own."""
