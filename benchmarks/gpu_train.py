"""Training on a GPU: speed against the plain recipe, and the memory plan against the card. Random weights, no Ray.

    python benchmarks/gpu.py --only train,memory

Under a hard cap of 24 GiB: ``train`` compares steps of 64 samples at 224 px, and of 6 samples of 20 to 800 tokens at
448 px, with the recipe written plainly (eager attention, float32 logits at every position, rows padded to the longest,
autocast everywhere). ``memory`` (gpu_memory.py) runs each stage at the largest micro-batch that the plan allows.

Cases are run in order of importance, each while the time limit allows it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from gpu_model import CAP_BYTES, checkpointing, random_model, train_step
from gpu_rows import GIB, Clock, Row, Rows, memory_cap, sentence, synchronize
from torch.profiler import ProfilerActivity, profile
from train_step import make_samples, plain_batch

from tinygptv.config import TinyGPTVConfig
from tinygptv.data.collate import LoadedSample, MicroBatch, collate
from tinygptv.data.flatten import flatten
from tinygptv.miniature.tiny import tiny_config
from tinygptv.training.compilation import run_eagerly


@dataclass(frozen=True)
class Size:
    """How large a benchmark is.

    Attributes:
        image_size: pixels of the short batches.
        large_image_size: pixels of the mixed batches.
        batch: samples of a short batch.
        answers: fewest and most answer tokens of a short batch.
        mixed: fewest and most answer tokens of a mixed batch.
        steps: steps that are timed.
        product: side of the square matrix product that measures the device's rate.
    """

    image_size: int
    large_image_size: int
    batch: int
    answers: tuple[int, int]
    mixed: tuple[int, int]
    steps: int
    product: int

    def config(self) -> TinyGPTVConfig:
        """Configuration of the model at the small image size."""
        if self.image_size == SIZES["paper"].image_size:
            return TinyGPTVConfig.phi2(image_size=self.image_size)
        return tiny_config()


SIZES = {
    "paper": Size(224, 448, 64, (8, 33), (20, 801), steps=6, product=8192),
    "tiny": Size(28, 56, 4, (3, 6), (4, 20), steps=2, product=64),
}
MIXED_SAMPLES = 6


def train_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """Speed of training steps.

    Args:
        deadline_s: seconds for all cases, building the model included.
        size: key of ``SIZES``.
        device: where to run.

    Returns:
        Rows, which were also printed one by one.
    """
    rows = Rows("train")
    bench = TrainBench(rows, Clock(rows, deadline_s), SIZES[size], torch.device(device))
    with memory_cap(bench.device, CAP_BYTES):
        bench.run()
    return rows


class TrainBench:
    """One model and one optimizer; every case is a way to do the same step with them."""

    def __init__(self, rows: Rows, clock: Clock, size: Size, device: torch.device) -> None:
        self.rows, self.clock, self.size, self.device = rows, clock, size, device
        self.rate = matrix_rate(device, size.product)
        rows.put("matrix rate", self.rate / 1e12, "TFLOP/s", note=f"bf16 product of {size.product}^3")
        self.model = random_model(size.config(), device)
        self.step = train_step(self.model)

    def run(self) -> None:
        """All cases, most important first."""
        short = self._batches(self.size.batch, self.size.answers)
        cached, inline = self._collated(short, cached=True), self._collated(short)
        self._case("ours, cached", 35, self._ours(cached), self.size.batch)
        self._language_share(cached)
        self._case("ours, inline", 20, self._ours(inline), self.size.batch)
        self._plain_case("plain", short)
        for case, floor in (("ours, cached", 4.0), ("ours, inline", 2.5)):
            self._compare(case, "plain", floor)
        self._profile("ours, cached", self._ours(cached)[0])
        self._mixed(cached[0])
        self.model.set_image_size(self.size.image_size)
        self._profile("ours, inline", self._ours(inline)[0])
        self._encoder(self.size.batch)
        self._case("ours, cached, not compiled", 10, self._ours(cached, compiled=False), self.size.batch)

    def _mixed(self, short: MicroBatch) -> None:
        """Samples of 20 to 800 tokens at 448 px; then the losses of a short batch, which compile once more."""
        self.model.set_image_size(self.size.large_image_size)
        mixed = self._batches(MIXED_SAMPLES, self.size.mixed)
        longest = max(len(s.encoded.input_ids) for batch in mixed for s in batch)
        cached = self._collated(mixed, cached=True, pack_length=longest)
        self._case("448 px mix, ours, inline", 12, self._ours(self._collated(mixed)), MIXED_SAMPLES)
        self._plain_case("448 px mix, plain", mixed)
        self._case("448 px mix, ours, cached", 10, self._ours(cached), MIXED_SAMPLES)
        for case in ("448 px mix, ours, inline", "448 px mix, ours, cached"):
            self._compare(case, "448 px mix, plain", 3.0)
        self._compiled_loss(short)

    def _batches(self, count: int, lengths: tuple[int, int], batches: int = 3) -> list[list[LoadedSample]]:
        """Different batches, as in training: their lengths differ."""
        return [make_samples(self.model.config, count, lengths, seed) for seed in range(batches)]

    def _collated(
        self, batches: Sequence[Sequence[LoadedSample]], *, cached: bool = False, pack_length: int = 0
    ) -> list[MicroBatch]:
        with_features = [[self._with_features(s) for s in batch] for batch in batches] if cached else batches
        return [collate(batch, 0, pack_length=pack_length) for batch in with_features]

    def _with_features(self, sample: LoadedSample) -> LoadedSample:
        config = self.model.config
        shape = (config.num_query_tokens, config.qformer_config.hidden_size)
        features = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16)
        return replace(sample, pixels=None, query_features=features)

    def _ours(self, batches: Sequence[MicroBatch], *, compiled: bool = True) -> list[Callable[[], object]]:
        def run(batch: MicroBatch) -> None:
            with nullcontext() if compiled else run_eagerly():
                self.step.run([batch], 1e-5)

        return [partial(run, batch) for batch in batches]

    def _plain_case(self, what: str, batches: Sequence[list[LoadedSample]]) -> None:
        """The step as the original writes it, with gradient checkpointing, which the cap makes necessary."""

        def run(inputs: dict[str, torch.Tensor]) -> None:
            self.step.gradient.zero_()
            moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            with run_eagerly(), torch.autocast(self.device.type, dtype=torch.bfloat16):
                self.model(**moved, use_cache=False).loss.backward()
            self.step.optimizer.step()

        checkpointing(self.model, True)
        self.model.set_attn_implementation("eager")
        steps = [partial(run, plain_batch(batch, 0)) for batch in batches]
        self._case(what, 12, steps, len(batches[0]))
        self.model.set_attn_implementation("sdpa")
        checkpointing(self.model, False)

    def _case(self, what: str, needs_s: float, steps: Sequence[Callable[[], object]], samples: int) -> None:
        """Samples per second of steps that are taken in turn, after one round of warm-up."""
        if not self.clock.allows(what, needs_s if self.size.product > 1000 else 0):
            return
        with self._noting_errors(what):
            began = time.perf_counter()
            for run in steps:
                run()
            synchronize(self.device)
            warm_up_s = time.perf_counter() - began
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                ballast = torch.cuda.memory_allocated()
            seconds, host = self._time(steps)
            note = f"{seconds * 1e3:.0f} ms, of which the host {host * 1e3:.0f}; first steps {warm_up_s:.0f} s"
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() - ballast
                note += f"; {peak / GIB:.1f} GiB above weights"
            self.rows.put(what, samples / seconds, "samples/s", note=note)

    @contextmanager
    def _noting_errors(self, what: str) -> Iterator[None]:
        """An error becomes a row: the other cases must still run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.rows.put(what, None, "", note=sentence(error))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _time(self, steps: Sequence[Callable[[], object]]) -> tuple[float, float]:
        """Seconds of a step, and seconds until the host has launched it, means."""
        host = 0.0
        synchronize(self.device)
        began = time.perf_counter()
        for i in range(self.size.steps):
            started = time.perf_counter()
            steps[i % len(steps)]()
            host += time.perf_counter() - started
        synchronize(self.device)
        return (time.perf_counter() - began) / self.size.steps, host / self.size.steps

    def _compare(self, case: str, base: str, floor: float) -> None:
        ours, plain = self.rows.value(case), self.rows.value(base)
        if ours and plain:
            self.rows.put(f"{case}: times plain", ours / plain, "x", floor=floor)

    def _language_share(self, batches: Sequence[MicroBatch]) -> None:
        """Share of the matrix rate that the language part reaches, the optimizer's time included."""
        rate = self.rows.value("ours, cached")
        if not rate:
            return
        config = self.model.config
        flats = [flatten(batch, config.image_token_id) for batch in batches]
        tokens = sum(batch.num_real for batch in batches) / len(batches)
        flops = language_flops(config, tokens, sum(len(f.supervised_ids) for f in flats) / len(flats))
        achieved = flops * rate / self.size.batch
        note = f"{achieved / 1e12:.0f} TFLOP/s: 4 per frozen weight and real token, LoRA and attention not counted"
        self.rows.put("ours, cached: share of the matrix rate", achieved / self.rate * 100, "%", floor=50, note=note)

    def _compiled_loss(self, batch: MicroBatch) -> None:
        """Loss and gradient of one batch, compiled and not, without dropout."""
        if not self.clock.allows("loss, compiled - uncompiled", 30 if self.size.product > 1000 else 0):
            return
        losses, gradients = [], []
        with self._noting_errors("loss, compiled - uncompiled"):
            self.model.eval()
            for context in (nullcontext(), run_eagerly()):
                self.step.gradient.zero_()
                with context:
                    token_losses = self.step.forward(batch)
                token_losses.mean().backward()
                losses.append(float(token_losses.detach().mean()))
                gradients.append(self.step.gradient.clone())
            change = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
            note = f"{losses[0]:.5f} and {losses[1]:.5f}; gradients differ by {change:.2%} of their norm"
            self.rows.put("loss, compiled - uncompiled", abs(losses[0] - losses[1]), "nats", note=note)
        self.model.train()

    def _profile(self, what: str, run: Callable[[], object]) -> None:
        """Time that the device works in one step, and its longest kernels."""
        if self.device.type != "cuda" or not self.clock.allows(f"{what}: device busy", 10):
            return
        with self._noting_errors(f"{what}: device busy"):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                run()
                synchronize(self.device)
            events = profiler.key_averages()
            launches = sum(event.count for event in events)
            busy = sum(event.self_device_time_total for event in events) / 1e3
            self.rows.put(f"{what}: device busy", busy, "ms", note=f"{launches} kernels and copies in one step")
            longest = sorted(events, key=lambda event: -event.self_device_time_total)[:25]
            for event in longest:
                print(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6}  {event.key[:110]}")

    def _encoder(self, images: int) -> None:
        side = self.model.config.vision_config.image_size
        pixels = torch.randn(images, 3, side, side, device=self.device)

        def run() -> None:
            with torch.no_grad():
                self.model.encode_query_features(pixels)

        self._case(f"encoder alone, {images} images of {side} px", 5, [run], images)


def matrix_rate(device: torch.device, side: int) -> float:
    """Floating-point operations per second of a square product in bfloat16."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rounds = 20 if device.type == "cuda" else 1
    for count in (3, rounds):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        synchronize(device)
        seconds = time.perf_counter() - began
    return 2 * side**3 * rounds / seconds


def language_flops(config: TinyGPTVConfig, tokens: float, positions: float) -> float:
    """Operations of a step's frozen language matrices: forward, and the gradient of their inputs."""
    text = config.text_config
    layer = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size
    return 4 * (tokens * text.num_hidden_layers * layer + positions * text.hidden_size * text.vocab_size)
