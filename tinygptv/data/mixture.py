"""Which samples make step k: a pure function of (sources, seed, k), without I/O. Recent parts of it are cached.

A step draws ``draws_per_step`` sources and takes ``batch_size`` samples from each. One draw with a large batch is the
release's way (``MultiIterLoader``: one source per step and rank); many draws of one sample mix within the step.

Within a source, epoch e visits every row exactly once. Shards are put in a random order and cut into windows of
``window_shards``; rows are shuffled inside a window, so that reads stay local and memory stays bounded at web scale.

Ranks share a step by taking every ``world_size``-th sample, so the samples of step k do not depend on how many workers
there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tinygptv.lru import LRU

_BLOCK = 4096
"""Steps whose source draws are made and counted together; jumping to step k costs k / _BLOCK small array draws."""


@dataclass(frozen=True)
class MixtureSource:
    """One data set of a mixture.

    Attributes:
        name: data set name.
        weight: relative share; need not sum to one.
        batch_size: samples taken each time the source is drawn.
        shard_rows: rows of each shard, in manifest order.
    """

    name: str
    weight: float
    batch_size: int
    shard_rows: tuple[int, ...]

    @cached_property
    def num_rows(self) -> int:
        """Rows of one epoch; summed once: every sample asks, and a web-scale set has tens of thousands of shards."""
        return sum(self.shard_rows)


@dataclass(frozen=True)
class SampleRef:
    """One draw.

    Attributes:
        source: index into the mixture's sources.
        row: row within the source, counted through its shards in manifest order.
        position: how many samples of this source were drawn before; keys the sample's random choices.
    """

    source: int
    row: int
    position: int


@dataclass(frozen=True)
class Mixture:
    """The order of a whole training.

    Attributes:
        sources: the data sets, in the order of the stage.
        seed: everything random follows from it.
        draws_per_step: sources drawn for each step.
        window_shards: shards that are shuffled together.
    """

    sources: tuple[MixtureSource, ...]
    seed: int
    draws_per_step: int = 1
    window_shards: int = 8

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a mixture needs at least one source.")
        for source in self.sources:
            if source.num_rows < 1:
                raise ValueError(f"source {source.name!r} has no rows: prepare its data, or take it out of the stage.")
            if not source.weight > 0:
                raise ValueError(f"source {source.name!r} has weight {source.weight}; a weight must be positive.")

    def step(self, k: int) -> list[SampleRef]:
        """The samples of optimizer step k (0-based), over all workers."""
        if k < 0:
            raise ValueError(f"step {k} is negative.")
        block, offset = divmod(k, _BLOCK)
        draws, counts_before = self._block(block)
        consumed = counts_before + self._taken(draws[:offset])
        refs = []
        for index in np.repeat(draws[offset], self._batch_sizes[draws[offset]]):
            position = int(consumed[index])
            consumed[index] += 1
            refs.append(SampleRef(int(index), self._row(int(index), position), position))
        return refs

    def rank_step(self, k: int, rank: int, world_size: int) -> list[SampleRef]:
        """The share of step k that worker ``rank`` of ``world_size`` trains on."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} workers.")
        return self.step(k)[rank::world_size]

    def generator(self, ref: SampleRef) -> np.random.Generator:
        """The random generator of one draw: depends on (seed, source, position) alone."""
        return _generator(self.seed, 3, ref.source, ref.position)

    # ------------------------------------------------------------------ sources drawn

    @cached_property
    def _probabilities(self) -> np.ndarray:
        weights = np.array([source.weight for source in self.sources], dtype=np.float64)
        shares: np.ndarray = weights / weights.sum()
        return shares

    @cached_property
    def _batch_sizes(self) -> np.ndarray:
        return np.array([source.batch_size for source in self.sources], dtype=np.int64)

    def _draws(self, block: int) -> np.ndarray:
        """Sources drawn in a block of steps: [_BLOCK, draws_per_step]."""
        generator = _generator(self.seed, 0, block)
        return generator.choice(len(self.sources), size=(_BLOCK, self.draws_per_step), p=self._probabilities)

    def _taken(self, draws: np.ndarray) -> np.ndarray:
        """Samples of each source that these draws consume."""
        taken: np.ndarray = np.bincount(draws.ravel(), minlength=len(self.sources)) * self._batch_sizes
        return taken

    def _consumed_before(self, block: int) -> np.ndarray:
        """Samples of each source that all blocks before this one consume."""
        consumed = np.zeros(len(self.sources), dtype=np.int64)
        for earlier in range(block):
            consumed += self._taken(self._draws(earlier))
        return consumed

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        made: tuple[np.ndarray, np.ndarray] = self._recent.get_or_make(
            ("block", block), lambda: (self._draws(block), self._consumed_before(block))
        )
        return made

    # ------------------------------------------------------------------ rows within a source

    def _row(self, index: int, position: int) -> int:
        epoch, offset = divmod(position, self.sources[index].num_rows)
        starts, windows = self._recent.get_or_make(("windows", index, epoch), lambda: self._windows(index, epoch))
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        key = ("rows", index, epoch, window)
        rows = self._recent.get_or_make(key, lambda: self._shuffled_rows(index, epoch, window, windows[window]))
        return int(rows[offset - starts[window]])

    def _windows(self, index: int, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Start of each window in the epoch, and the shards of each window."""
        shard_rows = np.array(self.sources[index].shard_rows, dtype=np.int64)
        order = _generator(self.seed, 1, index, epoch).permutation(len(shard_rows))
        windows = [order[i : i + self.window_shards] for i in range(0, len(order), self.window_shards)]
        lengths = np.array([shard_rows[window].sum() for window in windows], dtype=np.int64)
        return np.concatenate([[0], np.cumsum(lengths)[:-1]]), windows

    def _shuffled_rows(self, index: int, epoch: int, window: int, shards: np.ndarray) -> np.ndarray:
        shard_rows = self.sources[index].shard_rows
        firsts = np.concatenate([[0], np.cumsum(shard_rows)])
        rows = np.concatenate([np.arange(firsts[shard], firsts[shard] + shard_rows[shard]) for shard in shards])
        return _generator(self.seed, 2, index, epoch, window).permutation(rows)

    # ------------------------------------------------------------------ recent computations

    @cached_property
    def _recent(self) -> LRU[tuple[Any, ...], Any]:
        return LRU(8 + 4 * len(self.sources))


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
