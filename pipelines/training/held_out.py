"""Loss of held-out rows while a stage trains, and the score of answers to them: which rows, and how it is computed.

The rows and their wordings depend on the data and the seed alone. Computing the loss changes nothing that training
depends on, so a resumed run stays the same to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pipelines import storage
from pipelines.data.feature_set import FeatureError, FeatureSet
from pipelines.data.held_out import row_hashes
from pipelines.data.loader import BatchMaker, LoadPlan
from pipelines.data.shards import ShardSet, find_shard_sets
from pipelines.fingerprint import digest_of
from pipelines.settings import TrainSettings
from pipelines.training.held_out_questions import HeldOutQuestions
from tinygptv.data.collate import LoadedSample
from tinygptv.training.train_step import TrainStep

logger = logging.getLogger(__name__)

_GENERATOR = 4
"""Tells the generators of held-out wordings from those of the mixture (``tinygptv.data.mixture``)."""


@dataclass(frozen=True)
class HeldOutSource:
    """Rows of one data set that are evaluated.

    Attributes:
        name: what its loss is called.
        shards: its shard set.
        rows: row numbers, in the order of their hashes.
        hashes: of these rows; their wordings are drawn from them.
        features: cached features of the shard set; None encodes images.
    """

    name: str
    shards: ShardSet
    rows: tuple[int, ...]
    hashes: tuple[float, ...]
    features: FeatureSet | None


def open_sources(settings: TrainSettings, plan: LoadPlan, shards: dict[str, ShardSet]) -> list[HeldOutSource]:
    """The rows that are evaluated: of ``eval_data``, or those of the training data that are kept from training.

    Of each source ``settings.eval_rows`` are taken, those of the least hash: adding data changes few of them.

    Raises:
        FileNotFoundError: ``eval_data`` holds no shard set.
    """
    if not settings.eval_data:
        return [_open(settings, plan, name, shards[name], plan.held_out[name]) for name in shards]
    found = find_shard_sets(settings.eval_data)
    if not found:
        raise FileNotFoundError(f"eval_data={settings.eval_data} holds no shard set: run jobs/prepare_data.py for it.")
    sets = {storage.file_name(folder): ShardSet.open(folder) for folder in found}
    return [_open(settings, plan, name, each, np.arange(len(each))) for name, each in sets.items()]


def _open(
    settings: TrainSettings, plan: LoadPlan, name: str, shards: ShardSet, candidates: np.ndarray
) -> HeldOutSource:
    hashes = row_hashes(shards, candidates)
    chosen = np.lexsort((candidates, hashes))[: settings.eval_rows]
    features = None
    if plan.feature_key:
        try:
            features = FeatureSet.open(shards.uri, plan.feature_key)
        except FeatureError:
            logger.info("held-out images of %s have no cached features; they are encoded at every evaluation.", name)
    return HeldOutSource(name, shards, tuple(candidates[chosen].tolist()), tuple(hashes[chosen].tolist()), features)


@dataclass(frozen=True)
class HeldOutShare:
    """What one worker found.

    Attributes:
        losses: sum of token losses and number of tokens, by source.
        scores: sum of scores (0..1) and number of questions, by source; sources without questions are missing.
    """

    losses: Mapping[str, tuple[float, int]]
    scores: Mapping[str, tuple[float, int]]


class HeldOutRows:
    """Computes loss and scores of held-out rows; all workers of a training do it together."""

    def __init__(self, settings: TrainSettings, plan: LoadPlan, train_step: TrainStep) -> None:
        """Open the rows.

        Args:
            settings: ``eval_data``, ``eval_rows``, ``eval_questions``, ``seed``.
            plan: of this worker.
            train_step: whose model is evaluated, in the precision of the training.
        """
        self.maker = BatchMaker(plan)
        self.train_step = train_step
        self.seed = settings.seed
        self.sources = open_sources(settings, plan, self.maker.shards)
        rows = {source.name: (source.shards, source.rows) for source in self.sources}
        self.questions = HeldOutQuestions(self.maker, rows, train_step, settings.eval_questions)

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows that are evaluated, by source."""
        return {source.name: len(source.rows) for source in self.sources}

    @property
    def digest(self) -> str:
        """Short hash of the rows that are evaluated: their data and their numbers."""
        return digest_of([[source.name, source.shards.manifest.digest, source.rows] for source in self.sources])

    def share(self) -> HeldOutShare:
        """Losses and scores of this worker's share of the rows."""
        model = self.train_step.model
        model.eval()
        try:
            with torch.no_grad(), self.train_step.as_written():
                losses = {source.name: self._sum(source) for source in self.sources}
                return HeldOutShare(losses, self.questions.sums())
        finally:
            model.train()

    def _sum(self, source: HeldOutSource) -> tuple[float, int]:
        total, tokens = 0.0, 0
        for batch in self.maker.batch(list(self._samples(source))):
            losses = self.train_step.forward(batch)
            total, tokens = total + float(losses.double().sum()), tokens + len(losses)
        return total, tokens

    def _samples(self, source: HeldOutSource) -> Iterator[LoadedSample]:
        plan = self.maker.plan
        own = range(plan.rank, len(source.rows), plan.world_size)
        for row, value in ((source.rows[i], source.hashes[i]) for i in own):
            key = (self.seed, _GENERATOR, int(value * 2**53))
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
            yield self.maker.encode(source.shards, row, generator, 0, source.features)
