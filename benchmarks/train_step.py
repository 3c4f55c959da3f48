"""Samples per second and peak memory of a training step: ours, and the original recipe written plainly.

    python benchmarks/train_step.py                                reduced size, CPU
    python benchmarks/train_step.py --device cuda --size paper     Phi-2 and ViT-g with random weights, on a GPU
    python benchmarks/train_step.py --image-size 448

* ``plain``: eager attention, fp32 logits at every position, the encoder in every step, rows padded to the longest.
* ``ours``: SDPA, logits at supervised positions only, one flat gradient, encoder in every step.
* ``ours, encoder bf16``: the same, the frozen encoder in bfloat16 (the release has it in float16).
* ``ours, cached``: ours with the encoder's query features computed before.
* ``mixed``: the same on lengths from 20 to 300 tokens, as in stage 4; ours also packed.

All take the same samples and the same AdamW, and share one model. They take turns, so that a busy machine is busy for
all of them; CPU seconds per step are what stays comparable there. Needs no Ray.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from note import LoadWatch, peak_memory, versions, write_note

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.collate import LoadedSample, MicroBatch, collate
from tinygptv.data.images import normalise_pixels
from tinygptv.data.sample import IGNORE_INDEX, EncodedSample
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.stages import set_trainable
from tinygptv.training.train_step import TrainStep

PROMPT_TOKENS = 3
VARIANTS = (
    "plain",
    "ours",
    "ours, encoder bf16",
    "ours, cached",
    "plain, mixed",
    "ours, mixed",
    "ours, mixed, cached and packed",
)


def reduced_config(image_size: int, depth: int) -> TinyGPTVConfig:
    """Phi-2's vocabulary and head width, and few layers: minutes on two cores.

    The encoder takes three tenths of our step with four layers, and 45% with eight, which is nearer to paper scale.
    """
    return TinyGPTVConfig(
        vision_config={
            "image_size": image_size, "patch_size": 14, "hidden_size": 352, "num_hidden_layers": depth,
            "num_attention_heads": 4, "intermediate_size": 1536,
        },
        qformer_config={
            "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024,
            "encoder_hidden_size": 352,
        },
        text_config={
            "vocab_size": 51200, "hidden_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
            "intermediate_size": 2560, "resid_pdrop": 0.0,
        },
        projector_hidden_size=1024,
        lora_rank=64,
    )  # fmt: skip


def make_samples(config: TinyGPTVConfig, count: int, lengths: tuple[int, int], seed: int) -> list[LoadedSample]:
    """Random images and texts; the prompt is an image and a few tokens, the rest is learned."""
    rng = np.random.default_rng(seed)
    side, queries = config.vision_config.image_size, config.num_query_tokens
    vocabulary = min(50000, config.text_config.vocab_size)
    samples = []
    for _ in range(count):
        answer = int(rng.integers(*lengths))
        ids = np.concatenate(
            [
                rng.integers(0, vocabulary, PROMPT_TOKENS),
                np.full(queries, config.image_token_id),
                rng.integers(0, vocabulary, answer),
            ]
        )
        start = PROMPT_TOKENS + queries
        encoded = EncodedSample()
        encoded.add(ids[:start].tolist())
        encoded.add(ids[start:].tolist(), learn=True)
        samples.append(LoadedSample(encoded, 0, pixels=rng.integers(0, 256, (3, side, side), dtype=np.uint8)))
    return samples


@dataclass
class Bench:
    """One model, one optimizer, and the steps that take turns with them."""

    model: TinyGPTVForConditionalGeneration
    step: TrainStep
    precision: torch.dtype

    def ours(self, batch: MicroBatch, encoder_dtype: torch.dtype) -> None:
        self.model.set_attn_implementation("sdpa")
        self.step.encoder_dtype = encoder_dtype
        self.step.run([batch], 1e-5)

    def plain(self, batch: dict[str, torch.Tensor]) -> None:
        """The step as the original writes it: forward with labels, backward, AdamW."""
        self.model.set_attn_implementation("eager")
        self.step.gradient.zero_()
        device = self.model.device
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            self.model(**inputs, use_cache=False).loss.backward()
        self.step.optimizer.step()


def plain_batch(samples: list[LoadedSample], pad: int) -> dict[str, torch.Tensor]:
    """Rows padded to the longest, normalised pixels."""
    width = max(len(s.encoded.input_ids) for s in samples)
    rows: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for sample in samples:
        fill = width - len(sample.encoded.input_ids)
        for name, value in (("input_ids", pad), ("labels", IGNORE_INDEX), ("attention_mask", 0)):
            rows[name].append(np.pad(getattr(sample.encoded, name), (0, fill), constant_values=value))
    pixels = normalise_pixels(np.stack([s.pixels for s in samples]))
    batch = {name: torch.from_numpy(np.stack(arrays)) for name, arrays in rows.items()}
    return {**batch, "pixel_values": torch.from_numpy(pixels)}


def cached(bench: Bench, samples: list[LoadedSample]) -> list[LoadedSample]:
    """The samples with query features instead of pixels."""
    with torch.inference_mode():
        pixels = np.stack([s.pixels for s in samples])
        features = bench.model.encode_query_features(bench.step.pixel_values(pixels)).float().cpu().numpy()
    return [replace(s, pixels=None, query_features=f) for s, f in zip(samples, features, strict=True)]


def build(arguments: argparse.Namespace) -> Bench:
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    paper = arguments.size == "paper"
    side = arguments.image_size
    config = TinyGPTVConfig.phi2(image_size=side) if paper else reduced_config(side, arguments.encoder_layers)
    config.lora_rank = config.lora_rank or 64
    with device:
        torch.set_default_dtype(precision)
        model = TinyGPTVForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    set_trainable(model, ("projector", "language_norms", "lora"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if arguments.checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    name = "bf16" if precision == torch.bfloat16 else "fp32"
    return Bench(model, TrainStep(model, optimizer, num_sources=1, precision=name), precision)


def make_steps(bench: Bench, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    config, pad = bench.model.config, 0
    short = make_samples(config, arguments.batch, (8, 33), seed=1)
    mixed = make_samples(config, arguments.batch, (20, 301), seed=2)
    pack = max(len(s.encoded.input_ids) for s in mixed)
    makers: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_batch(short, pad),
        "ours": lambda: collate(short, pad),
        "ours, encoder bf16": lambda: collate(short, pad),
        "ours, cached": lambda: collate(cached(bench, short), pad),
        "plain, mixed": lambda: plain_batch(mixed, pad),
        "ours, mixed": lambda: collate(mixed, pad),
        "ours, mixed, cached and packed": lambda: collate(cached(bench, mixed), pad, pack_length=pack),
    }
    batches = {name: makers[name]() for name in arguments.variants or VARIANTS}

    def run(name: str) -> None:
        if name.startswith("plain"):
            bench.plain(batches[name])
        else:
            bench.ours(batches[name], torch.bfloat16 if "bf16" in name else bench.precision)

    return {name: functools.partial(run, name) for name in batches}


def measure(bench: Bench, steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each step, in turns, after one step of warm-up each."""
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    synchronize = torch.cuda.synchronize if bench.model.device.type == "cuda" else lambda: None
    for turn in range(rounds + 1):
        for name, run in steps.items():
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            synchronize()
            if turn:
                timings[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return timings


def memory_of(arguments: argparse.Namespace, name: str) -> float:
    """Peak memory in GB of two steps of one variant, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return float(lines[-1])


def only(arguments: argparse.Namespace) -> None:
    """Run two steps of one variant and print the peak memory in GB."""
    arguments.variants = [arguments.only]
    bench = build(arguments)
    steps = make_steps(bench, arguments)
    if bench.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        steps[arguments.only]()
    on_gpu = bench.model.device.type == "cuda"
    print(torch.cuda.max_memory_allocated() / 1e9 if on_gpu else peak_memory() / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=["reduced", "paper"], default="reduced")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--encoder-layers", type=int, default=4, help="of the reduced size")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of the language model")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS)
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        return only(arguments)
    watch = LoadWatch()
    bench = build(arguments)
    timings = measure(bench, make_steps(bench, arguments), arguments.rounds)
    lines = ["| step | samples/s | ms (CPU ms) | vs plain | peak GB |", "|---|---|---|---|---|"]
    for name, seconds in timings.items():
        base = timings.get("plain, mixed" if "mixed" in name else "plain", seconds)
        wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
        busy = 1 if arguments.device == "cpu" else 0  # the column to compare by
        ratio = statistics.median(b[busy] / s[busy] for b, s in zip(base, seconds, strict=True))
        memory = "-" if arguments.no_memory else f"{memory_of(arguments, name):.2f}"
        rate = arguments.batch / (cpu if busy else wall)
        lines.append(f"| {name} | {rate:.2f} | {wall * 1e3:.0f} ({cpu * 1e3:.0f}) | {ratio:.2f} x | {memory} |")
    write_note("train_step", [versions(("torch", "transformers", "timm")), str(watch)], {"One training step": lines})


if __name__ == "__main__":
    main()
