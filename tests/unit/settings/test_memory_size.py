"""Sizes of memory as they are written in settings."""

from __future__ import annotations

import pytest

from pipelines.settings.memory_size import parse_bytes


def test_sizes_of_cards():
    assert parse_bytes("24GB") == parse_bytes("24 GiB") == 24 * 2**30
    assert parse_bytes("512MB") == parse_bytes("0.5gb") == 512 * 2**20 and parse_bytes(" 1.5 G ") == 1536 * 2**20
    for wrong in ("24", "GB", "-1GB", "0GB", "24TBs"):
        with pytest.raises(ValueError, match="no memory size: write it like 24GB"):
            parse_bytes(wrong)
