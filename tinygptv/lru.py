"""A bounded mapping that forgets what was used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRU(Generic[K, V]):
    """Keeps at most ``capacity`` entries; the least recently used leave first. Not thread-safe.

    Attributes:
        capacity: entries, or whatever ``size`` counts in.
    """

    def __init__(self, capacity: int, size: Callable[[V], int] | None = None) -> None:
        """Start empty.

        Args:
            capacity: bound of the sum of sizes; a larger single entry is kept alone.
            size: of one entry, e.g. its bytes; None counts each as 1.
        """
        self.capacity = capacity
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._used = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def get(self, key: K) -> V | None:
        """The value of a key, which is now the most recently used; None where it is not kept."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: K, value: V) -> None:
        """Keep a value, and drop others until the bound holds."""
        self.pop(key)
        self._entries[key] = value
        self._used += self._size_of(value)
        while self._used > self.capacity and len(self._entries) > 1:
            _, dropped = self._entries.popitem(last=False)
            self._used -= self._size_of(dropped)

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key; where it is not kept, it is made and kept."""
        if key not in self._entries:
            self.put(key, make())
        self._entries.move_to_end(key)
        return self._entries[key]

    def _size_of(self, value: V) -> int:
        return 1 if self._size is None else self._size(value)

    def pop(self, key: K) -> V | None:
        """Remove a key; gives its value, or None where it was not kept."""
        if key not in self._entries:
            return None
        value = self._entries.pop(key)
        self._used -= self._size_of(value)
        return value
