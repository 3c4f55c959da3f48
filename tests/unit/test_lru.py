"""A bounded mapping forgets what was used longest ago."""

from __future__ import annotations

import pytest

from tinygptv.lru import LRU


def test_the_least_recently_used_leaves_first():
    kept: LRU[str, int] = LRU(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert "b" not in kept and kept.get("a") == 1 and kept.get("c") == 3 and len(kept) == 2


def test_a_value_is_made_once_and_again_when_it_was_dropped():
    made = []
    kept: LRU[int, int] = LRU(2)
    for key in (1, 2, 1, 3, 1, 2):
        assert kept.get_or_make(key, lambda key=key: made.append(key) or key * 10) == key * 10
    assert made == [1, 2, 3, 2]


def test_sizes_are_bounded_and_a_large_entry_is_kept_alone():
    kept: LRU[int, bytes] = LRU(10, len)
    kept.put(1, b"x" * 6)
    kept.put(2, b"x" * 4)
    assert len(kept) == 2
    kept.put(2, b"x" * 5)  # replaced, not added
    assert 1 not in kept and 2 in kept
    kept.put(3, b"x" * 20)
    assert len(kept) == 1 and kept.get(3) == b"x" * 20
    assert kept.pop(3) == b"x" * 20 and kept.pop(3) is None
    kept.put(4, b"x" * 5)
    kept.put(5, b"x" * 5)
    assert len(kept) == 2


def test_what_cannot_be_made_is_not_kept():
    kept: LRU[int, int] = LRU(2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            kept.get_or_make(1, lambda: 1 // 0)
    assert len(kept) == 0
