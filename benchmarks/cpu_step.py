"""One step of the language model at Phi-2's size, through the engine's own decoder: ways of computing it, in turns.

    python benchmarks/cpu_step.py --bits 8 4                        one token, four sequences, a prompt of 64 tokens
    python benchmarks/cpu_step.py --bits 8 --busy                   again with one more process on every core
    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_step.py --busy    threads that sleep while they wait for each other
    python benchmarks/cpu_step.py --llama-bench PATH/llama-bench --bits 8 --formats Q8_0

Weights are random codes, so nothing is said about answers. Each way runs once in every turn, after one run that is not
counted (its threads and caches are then its own); what is printed are medians over the turns and the least. ``busy``
is the median beside one process per core that only counts, over the quiet one. ``CPU`` is the processor time of a step
divided by the threads: what a step would take with the cores to itself and memory fast enough.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from cpu_decode import LAYER_WEIGHTS, LAYERS, VOCABULARY, WIDTH
from torch import Tensor, nn

from tinygptv import TinyGPTVConfig, TinyGPTVForConditionalGeneration
from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.runner import FlatRunner, Piece, Row
from tinygptv.inference.sampling import SamplingParams
from tinygptv.quantization.linear_cpu import Int4Linear, Int8Linear

CONTEXT, SLOTS = 1024, 4
PROMPT, PAST = 64, 100
TOKENS = 6
"""Steps in a row that one timing of decoding covers, of each way."""


def random_tensors(matrix: nn.Linear, bits: int, group: int) -> dict[str, Tensor]:
    """What an artifact would hold of a matrix."""
    outputs, inputs = matrix.out_features, matrix.in_features
    bias = torch.zeros(outputs)
    if bits == 8:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return {"weight": weight, "scale": torch.full((outputs,), 2e-4), "bias": bias}
    pairs = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    scales = torch.tensor([2.0**-9, 0.0]).bfloat16().expand(inputs // group, outputs, 2)
    return {"weight": pairs, "scale": scales.contiguous(), "bias": bias}


def build_model(layers: int, **sizes: int) -> TinyGPTVForConditionalGeneration:
    """The language model without its matrices, which stay on the meta device.

    Args:
        layers: number of Phi-2's layers.
        sizes: of the text model, in place of Phi-2's.
    """
    config = TinyGPTVConfig.phi2(lora_rank=0, text_config={"num_hidden_layers": layers, **sizes})
    with torch.device("meta"):
        model = TinyGPTVForConditionalGeneration(config).eval()
    language = model.language_model
    language.embed_tokens = nn.Embedding(config.text_config.vocab_size, config.text_config.hidden_size).half()
    language.rotary_emb = type(language.rotary_emb)(config.text_config)
    for module in language.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter.ndim == 1 and "norm" in type(module).__name__.lower():
                setattr(module, name, nn.Parameter(torch.full(parameter.shape, float(name == "weight")), False))
    return model


def build_runner(bits: int, layers: int, group: int, **sizes: int) -> FlatRunner:
    """A runner whose language model (``build_model``) has random low-bit matrices."""
    model = build_model(layers, **sizes)
    kind = Int8Linear if bits == 8 else Int4Linear
    for layer in model.language_model.layers:
        for name, matrix in list(layer.named_modules()):
            if type(matrix) is nn.Linear:
                tensors = random_tensors(matrix, bits, group)
                layer.set_submodule(name, kind.restore(tensors, "cpu", torch.float32))
    model.lm_head = Int8Linear.restore(random_tensors(model.lm_head, 8, 0), "cpu", torch.float32)
    runner = FlatRunner(FlatDecoder(model, SLOTS, CONTEXT))
    for slot in range(SLOTS):
        runner.admit(slot, SamplingParams(), np.zeros(1, np.int64), 1)
        runner._last_tokens[slot] = 1
    return runner


def works(runner: FlatRunner) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    embeds = torch.randn(PROMPT, runner.decoder.num_heads * runner.decoder.head_dim)
    return {
        "one token": lambda: runner.launch([Row(0, PAST)], []),
        "four sequences": lambda: runner.launch([Row(slot, PAST + slot) for slot in range(SLOTS)], []),
        f"prompt of {PROMPT}": lambda: runner.launch([], [Piece(0, 0, PROMPT, embeds, is_last=True)]),
    }


def measure(jobs: dict[str, Callable[[], object]], turns: int, steps: int = 1) -> dict[str, tuple[float, float, float]]:
    """Median and least seconds, and median CPU seconds, of each job, over ``steps`` in a row; all take turns."""
    walls: dict[str, list[float]] = {name: [] for name in jobs}
    cpus: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(turns):
        for name, job in jobs.items():
            job()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                job()
            walls[name].append((time.perf_counter() - wall) / steps)
            cpus[name].append((time.process_time() - cpu) / steps)
    return {name: (float(np.median(walls[name])), min(walls[name]), float(np.median(cpus[name]))) for name in jobs}


def _count() -> None:
    while True:
        pass


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process per core that counts, within the block."""
    others = [multiprocessing.get_context("spawn").Process(target=_count, daemon=True) for _ in range(os.cpu_count())]
    for other in others:
        other.start()
    time.sleep(5)
    try:
        yield
    finally:
        for other in others:
            other.kill()


def llama_job(executable: str, kind: str, threads: int, folder: str) -> Callable[[], list[tuple[float, float]]]:
    """Runs llama-bench; returns median and least seconds per token and per prompt."""
    from cpu_decode_llama import write_model

    path = Path(folder) / f"{kind}.gguf"
    write_model(path, kind)

    def run() -> list[tuple[float, float]]:
        command = [executable, "-m", str(path), "-t", str(threads), "-r", "3", "-o", "json"]
        command += ["-p", str(PROMPT), "-n", str(TOKENS)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        prompt, decode = (np.array(entry["samples_ts"]) for entry in json.loads(done.stdout))
        each = (1 / decode, PROMPT / prompt)
        return [(float(np.median(seconds)), float(seconds.min())) for seconds in each]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[8], choices=(8, 4))
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer are scaled to Phi-2's 32")
    parser.add_argument("--group", type=int, default=64, help="4 bits: weights that share a scale")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--busy", action="store_true", help="again beside one process per core")
    parser.add_argument("--llama-bench", help="its path: llama.cpp takes turns too")
    parser.add_argument("--formats", nargs="+", default=["Q8_0", "Q4_0"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head = VOCABULARY * WIDTH / LAYER_WEIGHTS  # in layers
    scale = (LAYERS + head) / (options.layers + head)
    jobs: dict[str, dict[str, Callable[[], object]]] = {}
    for bits in options.bits:
        way = f"{bits} bits"
        runner = build_runner(bits, options.layers, options.group)
        for name, job in works(runner).items():
            jobs.setdefault(name, {})[way] = job
        print(f"{way}: resident {psutil.Process().memory_info().rss / 1e9:.2f} GB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        llama = {}
        if options.llama_bench:
            llama = {kind: llama_job(options.llama_bench, kind, options.threads, folder) for kind in options.formats}
        _print_turns(jobs, llama, options, scale)
    if options.busy:
        for name, ways in jobs.items():
            quiet = measure(ways, options.turns)
            with busy_cores():
                busy = measure(ways, options.turns)
            for way in ways:
                print(
                    f"busy: {name}, {way}: {busy[way][0] / quiet[way][0]:.2f} of quiet (load {os.getloadavg()[0]:.1f})"
                )


def _print_turns(
    jobs: dict[str, dict[str, Callable[[], object]]],
    llama: dict[str, Callable[[], list[tuple[float, float]]]],
    options: argparse.Namespace,
    scale: float,
) -> None:
    turns = 3 if llama else 1
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for _ in range(turns):
        for name, ways in jobs.items():
            steps = 1 if name.startswith("prompt") else TOKENS
            for way, (median, least, cpu) in measure(ways, options.turns, steps).items():
                entry = (median * scale, least * scale, cpu * scale / options.threads)
                found.setdefault((name, way), []).append(entry)
        for kind, run in llama.items():
            for name, entry in zip(("one token", f"prompt of {PROMPT}"), run(), strict=True):
                found.setdefault((name, kind), []).append((*entry, float("nan")))
    print(f"{options.threads} threads, {options.layers} layers, load {os.getloadavg()[0]:.1f}")
    print("| step | way | ms, medians of the turns | least | CPU |\n|---|---|---|---|---|")
    for (name, way), entries in sorted(found.items()):
        medians, least, cpu = zip(*entries, strict=True)
        cells = ", ".join(f"{1e3 * x:.0f}" for x in medians)
        print(f"| {name} | {way} | {cells} | {1e3 * min(least):.1f} | {1e3 * min(cpu):.1f} |", flush=True)


if __name__ == "__main__":
    main()
