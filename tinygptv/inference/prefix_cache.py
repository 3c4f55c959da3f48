"""Slots of the KV cache by sequence, and prefixes left in them that a new prompt can start from.

A sequence is known by its ids: token ids, with the image's own number at each image position. Two prompts
whose first n ids are equal have equal attention keys and values at the first n positions.

Notation: G slots, L cache length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_REUSED = 8
"""Shorter common beginnings are read again: finding room for them costs more than it saves."""


@dataclass(frozen=True)
class Placement:
    """Where a new sequence goes.

    Attributes:
        slot: its slot.
        num_reused: leading positions that need not be computed.
        copy_from: slot whose beginning is to be copied first; None where it is there already.
    """

    slot: int
    num_reused: int = 0
    copy_from: int | None = None


class PrefixCache:
    """Which slot holds what, and who uses it."""

    def __init__(self, num_slots: int, length: int) -> None:
        self.ids = np.zeros((num_slots, length), dtype=np.int64)
        self.lengths = np.zeros(num_slots, dtype=np.int64)
        self.salts = np.zeros(num_slots, dtype=np.int64)
        self.is_free = np.ones(num_slots, dtype=bool)
        self._last_used = np.zeros(num_slots, dtype=np.int64)
        self._clock = 0

    @property
    def num_free(self) -> int:
        """Slots that a new sequence can take."""
        return int(self.is_free.sum())

    def take(self, prompt_ids: np.ndarray, salt: int = 0) -> Placement:
        """Choose a slot for a prompt and mark it taken; the longest useful common beginning is reused.

        The last position of a prompt is never reused: its output is the answer's first token. Only slots of the same
        salt are looked at.
        """
        compared = prompt_ids[:-1]
        same = self.ids[:, : len(compared)] == compared
        common = np.where(same.all(axis=1), len(compared), np.argmin(same, axis=1)) if len(compared) else 0
        common = np.minimum(common, self.lengths) * (self.salts == salt)
        best = int(np.argmax(common))
        num_reused = int(common[best]) if common[best] >= MIN_REUSED else 0
        # A free slot that holds little else is continued in place; otherwise its contents may serve another request.
        in_place = num_reused > 0 and bool(self.is_free[best]) and 2 * num_reused >= self.lengths[best]
        slot = best if in_place else self._least_recent()
        self.is_free[slot] = False
        self.lengths[slot] = num_reused
        self.salts[slot] = salt
        self.ids[slot, : len(prompt_ids)] = prompt_ids
        return Placement(slot, num_reused, best if num_reused and slot != best else None)

    def extend(self, slot: int, length: int, token_id: int | None = None) -> None:
        """Record that positions [0, length) of a slot are computed; ``token_id`` is the last of them."""
        if token_id is not None:
            self.ids[slot, length - 1] = token_id
        self.lengths[slot] = length

    def release(self, slot: int) -> None:
        """Give a slot back; what it holds stays until the slot is needed."""
        self._clock += 1
        self._last_used[slot] = self._clock
        self.is_free[slot] = True

    def _least_recent(self) -> int:
        age = np.where(self.is_free, self._last_used, np.iinfo(np.int64).max)
        return int(np.argmin(age))
