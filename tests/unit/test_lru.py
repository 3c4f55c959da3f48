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


def test_sizes_are_counted_exactly_whatever_comes_and_goes():
    """After each step exactly what fits is kept: a size that is counted twice or forgotten would show later."""
    kept: LRU[str, int] = LRU(10, lambda value: value)
    steps = [("a", 3, "a"), ("b", 4, "ab"), ("c", 3, "abc"), ("b", 1, "acb"), ("d", 3, "acbd"), ("e", 1, "cbde")]
    for key, size, expected in steps:
        kept.put(key, size)
        assert [name for name in "abcde" if name in kept] == sorted(expected)
    assert kept.pop("d") == 3 and kept.get_or_make("f", lambda: 5) == 5 and len(kept) == 4, "c, b, e and f: 10"
    assert kept.get_or_make("c", lambda: pytest.fail("kept")) == 3
    kept.put("g", 1)
    assert "b" not in kept and "c" in kept, "c was used after b"


def test_nothing_is_a_value_too():
    kept: LRU[str, int | None] = LRU(2)
    for key in ("a", "a", "b", "a"):
        kept.put(key, None)
    assert kept.pop("a") is None and "a" not in kept and kept.pop("z") is None
    kept.put("c", 1)
    assert "b" in kept and "c" in kept, "two entries, and room for two"
    assert kept.get_or_make("b", lambda: pytest.fail("kept")) is None


def test_what_cannot_be_made_is_not_kept():
    kept: LRU[int, int] = LRU(2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            kept.get_or_make(1, lambda: 1 // 0)
    assert len(kept) == 0
