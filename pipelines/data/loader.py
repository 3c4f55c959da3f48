"""Loader: mixture plan -> ready batches for one training worker, made ahead by Ray Data, in an order that never varies.

The order is the mixture's (``tinygptv.data.mixture``): a pure function of the seed and the step. Ray Data only spreads
the work; a loader process that dies is replaced by Ray and makes the same batches again.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from pipelines import storage
from pipelines.cluster import quiet_ray_data
from pipelines.data.held_out import kept_counts, kept_row
from pipelines.data.shard_format import ShardError
from pipelines.data.shards import ShardSet
from pipelines.node_cache import local_checkpoint
from tinygptv.data.collate import LoadedSample, MicroBatch, collate, cut
from tinygptv.data.images import open_image, resize_pixels
from tinygptv.data.mixture import Mixture, MixtureSource, SampleRef
from tinygptv.data.prompt_layout import PromptLayout
from tinygptv.data.sample import SampleEncoder, chooser, render_sample
from tinygptv.training.stages import Stage

if TYPE_CHECKING:
    from pipelines.data.feature_set import FeatureSet

CHUNK_STEPS = 4
"""Steps that one loader task makes: fewer tasks, less scheduling."""

_MAKER_CPUS, _NUMBERS_CPUS = 0.5, 0.25
LOADER_CPUS = _MAKER_CPUS + _NUMBERS_CPUS
"""Logical CPUs without which a training worker's loader waits for ever.

A process that makes batches has the one part, the short tasks that give it numbers of steps the other.
"""


@dataclass(frozen=True)
class LoadPlan:
    """Everything a loader process needs to make the batches of one training worker.

    Attributes:
        data: folder (or URI) with one shard set per source.
        tokenizer: checkpoint folder (or URI) whose tokenizer is used.
        stage: sources, template, lengths, image size.
        seed: of the mixture.
        image_token_id: id of image positions.
        num_query_tokens: positions per image.
        micro_batch_size: most samples of one forward.
        micro_batch_tokens: most tokens of one forward; 0 does not count them.
        padded: whether their padding counts, too.
        pack_length: 0, or tokens of a packed row.
        feature_key: name of the cached features to read; empty decodes images.
        held_out: ascending row numbers of each source that are not trained on.
        digests: of the shard set of each source; one that has another was prepared again.
        rank: this worker.
        world_size: number of workers.
    """

    data: str
    tokenizer: str
    stage: Stage
    seed: int
    image_token_id: int
    num_query_tokens: int
    micro_batch_size: int
    micro_batch_tokens: int = 0
    padded: bool = True
    pack_length: int = 0
    feature_key: str = ""
    held_out: Mapping[str, np.ndarray] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    rank: int = 0
    world_size: int = 1

    def for_worker(self, rank: int, world_size: int) -> LoadPlan:
        """The same plan for another worker."""
        return replace(self, rank=rank, world_size=world_size)


@dataclass(frozen=True)
class CutCount:
    """Samples of a source, and how many of them were longer than the stage's limits.

    Attributes:
        samples: all of them.
        questions: whose first question was cut (``stage.limits.max_context_tokens``).
        answers: whose answer, or later turns, were cut (``stage.limits.max_text_tokens``).
    """

    samples: int = 0
    questions: int = 0
    answers: int = 0

    def __add__(self, other: CutCount) -> CutCount:
        return CutCount(self.samples + other.samples, self.questions + other.questions, self.answers + other.answers)


@dataclass
class StepBatch:
    """One worker's share of one optimizer step.

    Attributes:
        step: its number.
        micro_batches: ready arrays.
        sample_ids: ``source/id`` of all samples of the step, over all workers.
        cut: how many samples of this worker's share were cut, by source.
        wait_s: seconds the trainer waited for it.
    """

    step: int
    micro_batches: list[MicroBatch]
    sample_ids: list[str]
    cut: dict[str, CutCount]
    wait_s: float = 0.0


NONE_HELD_OUT = np.zeros(0, dtype=np.int64)


def build_mixture(
    stage: Stage, shards: dict[str, ShardSet], seed: int, held_out: Mapping[str, np.ndarray] | None = None
) -> Mixture:
    """The stage's mixture over opened shard sets; rows that are held out are not counted."""

    def counts(name: str) -> tuple[int, ...]:
        return kept_counts(tuple(shards[name].shard_rows), (held_out or {}).get(name, NONE_HELD_OUT))

    sources = tuple(
        MixtureSource(source.name, source.weight, source.batch_size, counts(source.name)) for source in stage.sources
    )
    return Mixture(sources, seed=seed, draws_per_step=stage.draws_per_step)


def open_shards(data: str, stage: Stage) -> dict[str, ShardSet]:
    """Open the shard set of every source of a stage.

    Raises:
        FileNotFoundError: a source was not prepared; the message names all that are missing and the command.
    """
    opened, missing = {}, []
    for source in stage.sources:
        folder = storage.join(data, source.name)
        try:
            opened[source.name] = ShardSet.open(folder)
        except FileNotFoundError:
            missing.append(source.name)
    if missing:
        raise FileNotFoundError(
            f"stage {stage.number} needs prepared data, and {data} lacks {', '.join(missing)}: "
            "run jobs/prepare_data.py for each source, or name those that are there as stage.sources."
        )
    return opened


class BatchMaker:
    """Makes the batches of a plan, any step in any order; holds open shards and a tokenizer."""

    def __init__(self, plan: LoadPlan) -> None:
        from tinygptv.data.processing import load_tokenizer

        self.plan = plan
        self.shards = open_shards(plan.data, plan.stage)
        for name, digest in plan.digests.items():
            if self.shards[name].manifest.digest != digest:
                raise ShardError(
                    f"{self.shards[name].uri} was prepared again while it was trained on: prepare it as it was and run "
                    "the same command again to resume, or begin again with another output=."
                )
        self.names = [source.name for source in plan.stage.sources]
        self.mixture = build_mixture(plan.stage, self.shards, plan.seed, plan.held_out)
        self.tokenizer = load_tokenizer(str(local_checkpoint(plan.tokenizer, weights=False)))
        layout = PromptLayout(
            self.tokenizer,
            plan.stage.prompt_template,
            image_token_id=plan.image_token_id,
            num_query_tokens=plan.num_query_tokens,
        )
        self.encoder = SampleEncoder(layout, plan.stage.limits)
        self.features = self._open_features() if plan.feature_key else {}

    def _open_features(self) -> dict[str, FeatureSet]:
        from pipelines.data.feature_set import FeatureSet

        return {name: FeatureSet.open(self.shards[name].uri, self.plan.feature_key) for name in self.names}

    def make(self, step: int) -> StepBatch:
        """The worker's batches of one step; samples of like length share a micro-batch, so that little is padding."""
        refs = self.mixture.rank_step(step, self.plan.rank, self.plan.world_size)
        samples = [self.load(ref) for ref in refs]
        sample_ids = self.sample_ids(step) if self.plan.rank == 0 else []
        return StepBatch(step, self.batch(samples), sample_ids, self._count_cut(samples))

    def batch(self, samples: Sequence[LoadedSample]) -> list[MicroBatch]:
        """Samples as micro-batches, shortest first."""
        plan = self.plan
        samples = sorted(samples, key=lambda sample: len(sample.encoded.input_ids))
        lengths = [len(sample.encoded.input_ids) for sample in samples]
        pieces = cut(lengths, plan.micro_batch_size, plan.micro_batch_tokens, padded=plan.padded)
        pad = self.tokenizer.pad_token_id
        return [collate(samples[piece], pad, pack_length=plan.pack_length) for piece in pieces]

    def _count_cut(self, samples: Sequence[LoadedSample]) -> dict[str, CutCount]:
        counts: dict[str, CutCount] = {}
        for sample in samples:
            name, encoded = self.names[sample.source], sample.encoded
            one = CutCount(1, int(encoded.question_cut), int(encoded.answer_cut))
            counts[name] = counts.get(name, CutCount()) + one
        return counts

    def load(self, ref: SampleRef) -> LoadedSample:
        """Read, draw, encode and decode one sample of the mixture."""
        name, row = self.names[ref.source], self._row(ref)
        features = self.features[name] if self.features else None
        return self.encode(self.shards[name], row, self.mixture.generator(ref), ref.source, features)

    def encode(
        self,
        shards: ShardSet,
        row: int,
        generator: np.random.Generator,
        source: int,
        features: FeatureSet | None = None,
    ) -> LoadedSample:
        """Read, draw, encode and decode one row.

        Args:
            shards: its shard set.
            row: its number.
            generator: of its wording.
            source: what the sample is counted under.
            features: of the shard set; None decodes images.
        """
        sample = shards.row(row)
        encoded = self.encoder.encode(render_sample(sample, chooser(generator)))
        if sample.image is None:
            return LoadedSample(encoded, source)
        if features is not None:
            return LoadedSample(encoded, source, query_features=features.row(row))
        pixels = resize_pixels(open_image(sample.image), self.plan.stage.image_size)
        return LoadedSample(encoded, source, pixels=pixels)

    def _row(self, ref: SampleRef) -> int:
        """Number of a drawn row in its shard set; the mixture does not count rows that are held out."""
        return kept_row(self.plan.held_out.get(self.names[ref.source], NONE_HELD_OUT), ref.row)

    def sample_ids(self, step: int) -> list[str]:
        """``source/id`` of every sample of a step, over all workers, in order."""
        refs = self.mixture.step(step)
        return [
            f"{self.names[ref.source]}/{self.shards[self.names[ref.source]].row_id(self._row(ref))}" for ref in refs
        ]


class RayMaker:
    """A ``BatchMaker`` as a Ray Data actor: step numbers in, pickled batches out."""

    def __init__(self, plan: LoadPlan) -> None:
        self.maker = BatchMaker(plan)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        """Make the batches of a block of steps."""
        steps = [int(step) for step in batch["id"]]
        return {"batch": [pickle.dumps(self.maker.make(step), protocol=5) for step in steps]}


def iterate_steps(
    plan: LoadPlan, start: int, stop: int, *, loader_workers: int, prefetch_steps: int
) -> Generator[StepBatch]:
    """Yield the batches of steps ``start`` .. ``stop - 1``, made ahead.

    Args:
        plan: of this worker.
        start: first step.
        stop: one past the last step.
        loader_workers: Ray Data actors that make batches; 0 makes them in a thread of this process.
        prefetch_steps: steps that may wait ready.
    """
    source = (
        _thread_steps(plan, start, stop, prefetch_steps)
        if loader_workers == 0
        else _ray_steps(plan, start, stop, loader_workers, prefetch_steps)
    )
    try:
        while True:
            before = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            batch.wait_s = time.perf_counter() - before
            yield batch
    finally:
        source.close()


def _thread_steps(plan: LoadPlan, start: int, stop: int, prefetch_steps: int) -> Generator[StepBatch]:
    ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=prefetch_steps)
    stopped = threading.Event()

    def put(item: StepBatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            maker = BatchMaker(plan)
            for step in range(start, stop):
                if stopped.is_set():
                    return
                put(maker.make(step))
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, name="loader", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()


def _ray_steps(plan: LoadPlan, start: int, stop: int, workers: int, prefetch_steps: int) -> Generator[StepBatch]:
    import ray.data

    from pipelines.data.ray_datasource import read_numbers

    quiet_ray_data().execution_options.preserve_order = True
    steps = read_numbers(start, stop, CHUNK_STEPS, num_cpus=_NUMBERS_CPUS)
    made = steps.map_batches(
        RayMaker,
        fn_constructor_args=(plan,),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_cpus=_MAKER_CPUS,
    )
    made.set_name(f"batches of worker {plan.rank}")
    prefetch_blocks = max(1, prefetch_steps // CHUNK_STEPS)
    for block in made.iter_batches(batch_size=None, prefetch_batches=prefetch_blocks):
        for payload in block["batch"]:
            yield pickle.loads(payload)
