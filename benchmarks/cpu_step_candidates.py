"""Whole decoding steps of Phi-2's size by other libraries, in turns with this project's C functions.

    python benchmarks/cpu_step_candidates.py --only ONNX --layers 8       candidates whose names have this in them
    python benchmarks/cpu_step_candidates.py --size tiny                  seconds: shows that each candidate runs

A candidate computes one token of one sequence from its id to its logits: embedding, all layers with their norms,
attention over a cache with room for the context, the head. ONNX Runtime gets it as one graph in one session, whose
cache is bound as input and as output; OpenVINO as one stateful model. Weights are random, so nothing is said about
answers; ``cpu_step_check.py`` compares each step with torch's layers at a small size. Candidates of the same bits
and the C functions are built in one process and take turns, so choose with ``--only`` and ``--layers`` what fits.

onnx, onnxruntime and openvino are no dependencies of the project: what is missing is reported and left out.

Notation: S tokens of a step, D width, N heads, H head width, L cache length, K vocabulary; O outputs, I inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from cpu_decode import ALL_WEIGHTS, LAYER_WEIGHTS, LAYERS, VOCABULARY, WIDTH, read_bandwidth
from cpu_step import PAST, PROMPT, TOKENS, build_model, build_runner
from cpu_step_onnx import OnnxStep
from cpu_step_openvino import OpenvinoStep
from torch import Tensor

from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.runner import FlatRunner, Piece, Row
from tinygptv.kernels import host_library
from tinygptv.quantization.linear_cpu import Int8Linear

# ------------------------------------------------------------------------------------------------------------- torch


class ReducedInt8:
    """A product as a sum over products, for compilers that make one loop of it which reads 8-bit weights."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Keep int8 [O, I] and the float32 scale [O] of each row."""
        self.weight, self.scale, self.bias = weight, scale, bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply float32 [S, I] to [S, O]."""
        product = (self.weight * rows[:, None]).sum(-1) * self.scale
        return product if self.bias is None else product + self.bias


@contextmanager
def torch_kernels() -> Iterator[None]:
    """Models that are built within the block compute with torch's kernels."""
    with mock.patch.dict(os.environ, {host_library.SWITCH: "off"}):
        host_library._load.cache_clear()
        try:
            yield
        finally:
            host_library._load.cache_clear()


class RunnerStep:
    """A step of this project's decoder."""

    def __init__(self, runner: FlatRunner) -> None:
        self.runner = runner

    def __call__(self, ids: list[int], past: int) -> object:
        """Launch one token, or a whole prompt."""
        if len(ids) == 1:
            return self.runner.launch([Row(0, past)], [])
        piece = Piece(0, past, past + len(ids), self.runner.decoder.embed(torch.tensor(ids)), is_last=True)
        return self.runner.launch([], [piece])

    def rewind(self, past: int) -> None:
        """The position is an input."""


# -------------------------------------------------------------------------------------------------------- candidates

Step = OnnxStep | OpenvinoStep | RunnerStep


@dataclass(frozen=True)
class Candidate:
    """A way to compute the step.

    Attributes:
        neighbour: bits of the C functions' model that takes turns with it.
        bits: read per weight of a layer, scales included.
        build: from the number of layers and the other sizes.
        reads_prompts: a prompt is timed, too.
    """

    neighbour: int
    bits: float
    build: Callable[[int, dict[str, int]], Step]
    reads_prompts: bool = True


def _host(bits: int) -> Callable[[int, dict[str, int]], Step]:
    return lambda layers, sizes: RunnerStep(build_runner(bits, layers, 64, **sizes))


def _torch(bits: int, compiled: bool = False, reduced: bool = False) -> Callable[[int, dict[str, int]], Step]:
    def build(layers: int, sizes: dict[str, int]) -> Step:
        with torch_kernels(), contextlib.ExitStack() as stack:
            if reduced:
                stack.enter_context(mock.patch.object(Int8Linear, "_choose", lambda self: ReducedInt8))
            runner = build_runner(bits, layers, 64, **sizes)
        step = RunnerStep(runner)
        if compiled:
            forward = torch.compile(FlatDecoder.forward.__wrapped__)  # without inference mode, which inductor refuses
            runner.decoder.forward = torch.no_grad()(partial(forward, runner.decoder))
            for past in (PAST, PAST + 1):  # the second length makes it a variable
                step([1], past)
        return step

    return build


def _onnx(bits: int, block: int) -> Callable[[int, dict[str, int]], Step]:
    return lambda layers, sizes: OnnxStep(build_model(layers, **sizes), bits, block)


def _openvino(bits: int, block: int, **properties: Any) -> Callable[[int, dict[str, int]], Step]:
    return lambda layers, sizes: OpenvinoStep(build_model(layers, **sizes), bits, block, **properties)


HOST = {bits: Candidate(bits, size, _host(bits)) for bits, size in ((8, 8), (4, 4.5))}
CANDIDATES = {
    "torch, 8 bits (FBGEMM)": Candidate(8, 8, _torch(8)),
    "torch.compile, 8 bits (FBGEMM)": Candidate(8, 8, _torch(8, compiled=True), False),
    "torch.compile, 8 bits, products as reductions": Candidate(8, 8, _torch(8, compiled=True, reduced=True), False),
    "ONNX Runtime, 8 bits, blocks of 32": Candidate(8, 9, _onnx(8, 32)),
    "ONNX Runtime, 8 bits, blocks of 128": Candidate(8, 8.25, _onnx(8, 128)),
    "ONNX Runtime, dynamic int8": Candidate(8, 8, _onnx(8, 0)),
    "OpenVINO, 8 bits": Candidate(8, 8, _openvino(8, 0)),
    "OpenVINO, 8 bits, groups of 128": Candidate(8, 8.25, _openvino(8, 128, DYNAMIC_QUANTIZATION_GROUP_SIZE=128)),
    "torch, 4 bits (aten)": Candidate(4, 4.5, _torch(4)),
    "ONNX Runtime, 4 bits, blocks of 32": Candidate(4, 5, _onnx(4, 32)),
    "ONNX Runtime, 4 bits, blocks of 128": Candidate(4, 4.25, _onnx(4, 128)),
    "OpenVINO, 4 bits, groups of 64": Candidate(4, 4.5, _openvino(4, 64, DYNAMIC_QUANTIZATION_GROUP_SIZE=64)),
    "OpenVINO, 4 bits, groups of 128": Candidate(4, 4.25, _openvino(4, 128, DYNAMIC_QUANTIZATION_GROUP_SIZE=128)),
}
"""What is timed, by name."""
TINY = {"hidden_size": 640, "num_attention_heads": 8, "intermediate_size": 1280, "vocab_size": 1024}


def measure(steps: dict[str, Step], tokens: int, turns: int) -> dict[str, list[float]]:
    """Seconds of a step of so many tokens in each turn; the first step of a turn is not counted."""
    walls: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            walls[name].append(_answer(step) if tokens == 1 else _prompt(step, tokens))
    return walls


def _answer(step: Step) -> float:
    step.rewind(PAST)
    step([1], PAST)
    started = time.perf_counter()
    for past in range(PAST + 1, PAST + 1 + TOKENS):
        step([1], past)
    return (time.perf_counter() - started) / TOKENS


def _prompt(step: Step, tokens: int) -> float:
    seconds = 0.0
    for _ in range(2):
        step.rewind(0)
        started = time.perf_counter()
        step([1] * tokens, 0)
        seconds = time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="candidates whose names have one of these in them")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer are scaled to Phi-2's 32")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: 2 narrow layers, in seconds")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers, sizes = (2, TINY) if options.size == "tiny" else (options.layers, {})
    print("| step | way | ms, median of the turns (least) | of the C functions' | read per token, floor |")
    print("|---|---|---|---|---|")
    for bits, host in HOST.items():
        chosen = {name: one for name, one in CANDIDATES.items() if one.neighbour == bits}
        chosen = {name: one for name, one in chosen.items() if any(part in name for part in options.only)}
        if chosen:
            _time_together(chosen | {f"C functions, {bits} bits": host}, options, layers, sizes)


def _time_together(
    chosen: dict[str, Candidate], options: argparse.Namespace, layers: int, sizes: dict[str, int]
) -> None:
    """Build all, then print a line for each and each kind of step."""
    steps: dict[str, Step] = {}
    for name, candidate in chosen.items():
        try:
            steps[name] = candidate.build(layers, sizes)
        except ImportError as error:
            print(f"| | {name} | not run: {error} |")
    gc.collect()
    memory, bandwidth = psutil.Process().memory_info().rss, read_bandwidth()
    weights = np.array([layers * LAYER_WEIGHTS, VOCABULARY * WIDTH])
    scale = ALL_WEIGHTS / weights.sum() if options.size == "full" else 1
    for tokens in (1, PROMPT):
        ways = {name: step for name, step in steps.items() if tokens == 1 or chosen[name].reads_prompts}
        found = measure(ways, tokens, options.turns if tokens == 1 else 3)
        *_, ours = found.values()
        for name, walls in found.items():
            ratio = float(np.median([wall / our for wall, our in zip(walls, ours, strict=True)]))
            size = scale * float(weights @ [chosen[name].bits, 8]) / 8
            cells = [
                "one token" if tokens == 1 else f"prompt of {tokens}",
                name,
                f"{1e3 * scale * float(np.median(walls)):.1f} ({1e3 * scale * min(walls):.1f})",
                f"{ratio:.2f}",
                f"{size / 1e9:.2f} GB, {1e3 * size / bandwidth:.0f} ms"
                if tokens == 1 and options.size == "full"
                else "",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    print(
        f"{layers} layers, {options.threads} threads read {bandwidth / 1e9:.1f} GB/s, resident {memory / 1e9:.1f} GB, "
        f"load {os.getloadavg()[0]:.1f}\n",
        flush=True,
    )
    torch._dynamo.reset()


if __name__ == "__main__":
    main()
