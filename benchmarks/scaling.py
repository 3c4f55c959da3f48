"""How a training step divides over workers: tokens per second, the all-reduce's share, more workers than cores.

    python benchmarks/scaling.py                     reduced size, CPU, cached features, 64 samples per step
    python benchmarks/scaling.py --workers 1 2 4

Two ways, so that one checks the other:

* ``run``: as many processes as workers, one thread each, joined by gloo; only up to the number of cores.
* ``parts``: every worker's share of the step is computed alone, one after another, and the slowest counts; the
  all-reduce of the same gradient is timed between as many processes that do nothing else. So more workers than cores
  can be told; their all-reduce is dearer here than on machines of their own, for they share two cores.

The global batch stays what it is, as in training: more workers have less each. Needs no Ray.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from note import LoadWatch, versions, write_note
from train_step import Bench, build, cached, make_samples

from tinygptv.data.collate import LoadedSample, collate


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: of the whole, and of its all-reduce."""

    step_s: float
    reduce_s: float


def step_samples(bench: Bench, arguments: argparse.Namespace) -> list[LoadedSample]:
    """The samples of a step; worker ``rank`` has every ``workers``-th of them, as training divides them."""
    return make_samples(bench.model.config, arguments.batch, (20, 101), seed=1)


def time_share(bench: Bench, share: list[LoadedSample], rounds: int) -> Timing:
    """Median of some steps on one worker's samples, after one of warm-up."""
    batches = [collate(share[i : i + 16], 0) for i in range(0, len(share), 16)]
    steps, reduces = [], []
    for turn in range(rounds + 1):
        started = time.perf_counter()
        result = bench.step.run(batches, 1e-5)
        if turn:
            steps.append(time.perf_counter() - started)
            reduces.append(result.reduce_s)
    return Timing(statistics.median(steps), statistics.median(reduces))


def together(workers: int, work: Callable[[int], list[float]]) -> list[list[float]]:
    """What ``work(rank)`` returns in each of so many processes that are joined by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_joined, (workers, work, folder), nprocs=workers)
        return [torch.load(Path(folder) / str(rank)) for rank in range(workers)]


def _joined(rank: int, workers: int, work: Callable[[int], list[float]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    torch.save(work(rank), Path(folder) / str(rank))
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class RunStep:
    """Whole steps in one of the joined processes."""

    arguments: argparse.Namespace
    workers: int

    def __call__(self, rank: int) -> list[float]:
        bench = build(self.arguments)
        share = cached(bench, step_samples(bench, self.arguments)[rank :: self.workers])
        timing = time_share(bench, share, self.arguments.rounds)
        return [timing.step_s, timing.reduce_s]


@dataclass(frozen=True)
class Reduce:
    """The all-reduce of a gradient of so many numbers in one of the joined processes."""

    numbers: int
    rounds: int

    def __call__(self, rank: int) -> list[float]:
        gradient = torch.ones(self.numbers)
        seconds = []
        for _ in range(self.rounds + 1):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(gradient)
            seconds.append(time.perf_counter() - started)
        return [statistics.median(seconds[1:])]


def by_run(arguments: argparse.Namespace, workers: int) -> Timing:
    """All workers at once; the shortest wait in the all-reduce is its own, longer ones are for the slowest worker."""
    ranks = together(workers, RunStep(arguments, workers))
    return Timing(max(step for step, _ in ranks), min(reduce for _, reduce in ranks) if workers > 1 else 0.0)


def by_parts(bench: Bench, samples: list[LoadedSample], workers: int, rounds: int) -> Timing:
    """Put together from the slowest share, computed alone, and the all-reduce, timed alone."""
    slowest = max(time_share(bench, samples[rank::workers], rounds).step_s for rank in range(workers))
    reduce_s = 0.0
    if workers > 1:
        reduce_s = max(seconds for (seconds,) in together(workers, Reduce(bench.step.gradient.numel(), 9)))
    return Timing(slowest + reduce_s, reduce_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=64, help="samples of a step, over all workers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gradient-mb", type=float, default=180, help="a gradient to reduce besides: the paper's")
    parser.set_defaults(device="cpu", size="reduced", image_size=224, encoder_layers=4, checkpointing=False)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    watch = LoadWatch()
    bench = build(arguments)
    samples = cached(bench, step_samples(bench, arguments))
    tokens = sum(len(sample.encoded.input_ids) for sample in samples)
    lines = [
        "| workers | way | ms per step | samples/s | tokens/s | all-reduce | of ideal |",
        "|---|---|---|---|---|---|---|",
    ]
    ideal: dict[str, float] = {}
    for workers in arguments.workers:
        timings = {"parts": by_parts(bench, samples, workers, arguments.rounds)}
        if workers <= (os.cpu_count() or 1):
            timings = {"run": by_run(arguments, workers), **timings}
        for way, timing in timings.items():
            one = ideal.setdefault(way, timing.step_s * workers)
            cells = [f"{timing.step_s * 1e3:.0f}", f"{arguments.batch / timing.step_s:.1f}"]
            cells += [f"{tokens / timing.step_s:.0f}", f"{timing.reduce_s / timing.step_s:.1%}"]
            lines.append(f"| {workers} | {way} | {' | '.join(cells)} | {one / workers / timing.step_s:.0%} |")
            print(lines[-1], file=sys.stderr, flush=True)
    numbers = int(arguments.gradient_mb * 1e6 / 4)
    reduces = ["| workers | ms | MB/s of gradient |", "|---|---|---|"]
    for workers in [workers for workers in arguments.workers if workers > 1]:
        seconds = max(seconds for (seconds,) in together(workers, Reduce(numbers, 3)))
        reduces.append(f"| {workers} | {seconds * 1e3:.0f} | {arguments.gradient_mb / seconds:.0f} |")
    size = f"{bench.step.gradient.numel() * 4 / 1e6:.1f} MB of gradient, {arguments.batch} samples, {tokens} tokens."
    parts = {"Steps": lines, f"All-reduce of {arguments.gradient_mb:g} MB by gloo, all processes here": reduces}
    write_note("scaling", [versions(("torch",)), size, str(watch)], parts)


if __name__ == "__main__":
    main()
