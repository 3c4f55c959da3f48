"""Inside a decoding step on a GPU: single products in every format, and the kernels that a step spends its time in.

    python benchmarks/gpu.py --only products,kernels,tuning

``products`` times one product of each of Phi-2's four matrices, for 1 to 64 tokens. ``kernels`` lists the kernels of a
step. ``tuning`` tries other shapes of the kernels' programs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gpu_decode import (
    BITS,
    SIZES,
    copy_rate,
    pack_language,
    random_layer,
    random_model,
    time_on_device,
)
from gpu_rows import Clock, Row, Rows, sentence
from torch import Tensor, nn

from tinygptv.config import TinyGPTVConfig
from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.graph_runner import GraphRunner, bucket_of


def products_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """Time of single products: microseconds, and the share of the memory's rate."""
    rows, where = Rows("products"), torch.device(device)
    clock = Clock(rows, deadline_s)
    rate = copy_rate(where, SIZES[size].copy_bytes)
    rows.put("copy", rate / 1e12, "TB/s", note="bytes read and written")
    shapes = product_shapes(SIZES[size].config())
    for tokens in (1, 4, 16, 32, 64) if size == "paper" else (1, 2):
        for kind in SIZES[size].formats:
            if not clock.allows(f"{kind}, {tokens} tokens", 1.0):
                return rows
            total, parts = 0.0, []
            try:
                for name, shape in shapes.items():
                    seconds = time_product(kind, shape, tokens, where)
                    total += seconds
                    parts.append(f"{name} {seconds * 1e6:.1f}")
            except Exception as error:  # the other formats must still run
                rows.put(f"{kind}, {tokens} tokens", None, "us", note=sentence(error))
                continue
            weights = sum(o * i for o, i in shapes.values())
            read = weights * BITS[kind] / 8
            note = f"{', '.join(parts)} us; {read / total / rate:.0%} of the copy rate"
            rows.put(f"{kind}, {tokens} tokens", total * 1e6, "us", note=note)
    return rows


def product_shapes(config: TinyGPTVConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a language layer's matrices."""
    width, inner = config.text_config.hidden_size, config.text_config.intermediate_size
    return {"qkv": (3 * width, width), "dense": (width, width), "fc1": (inner, width), "fc2": (width, inner)}


def time_product(kind: str, shape: tuple[int, int], tokens: int, device: torch.device) -> float:
    """Seconds of one product; several matrices take turns, so that no cache holds them."""
    outputs, inputs = shape
    count = max(2, int(160e6 / (outputs * inputs * BITS[kind] / 8))) if device.type == "cuda" else 1
    x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
    functions = [_product(kind, outputs, inputs, x) for _ in range(count)]

    def run() -> Tensor:
        for function in functions:
            output = function()
        return output

    return time_on_device(run, device, rounds=5) / count


def _product(kind: str, outputs: int, inputs: int, x: Tensor) -> Callable[[], Tensor]:
    if kind == "bf16":
        weight = torch.randn(outputs, inputs, device=x.device, dtype=x.dtype)
        return lambda: nn.functional.linear(x, weight)
    layer = random_layer(kind, outputs, inputs, None, x.device)
    return lambda: layer.partial_products(x)


def kernels_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """Which kernels a decoding step spends its time in."""
    rows, where = Rows("kernels"), torch.device(device)
    if where.type != "cuda":
        return rows
    for kind, clients in (("bf16", 1), ("bf16", 32), ("nf4", 1), ("nf4", 16)):
        model = random_model(SIZES[size].config(), where, torch.bfloat16)
        if kind != "bf16":
            pack_language(model, kind, torch.bfloat16)
        runner = GraphRunner(FlatDecoder(model, clients, SIZES[size].context))
        runner.lengths_G.fill_(SIZES[size].prompt * 4)
        runner._place(list(range(clients)))
        step = runner._step(bucket_of(clients))
        step._decode()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step._decode()
            torch.cuda.synchronize()
        spent: dict[str, list[float]] = {}
        for event in profile.events():
            spent.setdefault(event.name[:70], []).append(event.device_time_total)
        total = sum(sum(times) for times in spent.values())
        for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:9]:
            rows.put(
                f"{kind}, {clients}: {name}", sum(times) / 1e3, "ms", note=f"{len(times)} x {np.mean(times):.1f} us"
            )
        rows.put(f"{kind}, {clients}: all kernels", total / 1e3, "ms", note=f"{sum(map(len, spent.values()))} kernels")
        del model, runner, step
        torch.cuda.empty_cache()
    return rows


def tuning_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """Other shapes of the kernels' programs: what the constants in ``kernels`` were chosen from."""
    rows, where = Rows("tuning"), torch.device(device)
    if where.type != "cuda":
        return rows
    from tinygptv.kernels import fused, lowbit

    clock = Clock(rows, deadline_s)
    shapes = list(product_shapes(SIZES[size].config()).values())

    def attempt(what: str, module: ModuleType, values: dict[str, Any], function: Callable[[], float]) -> None:
        if not clock.allows(what, 2.0):
            return
        kept = {name: getattr(module, name) for name in values}
        try:
            for name, value in values.items():
                setattr(module, name, value)
            rows.put(f"{what}, {values}", function() * 1e6, "us")
        except Exception as error:
            rows.put(f"{what}, {values}", None, "us", note=sentence(error))
        finally:
            for name, value in kept.items():
                setattr(module, name, value)

    def products(kind: str, tokens: int) -> Callable[[], float]:
        return lambda: sum(time_product(kind, shape, tokens, where) for shape in shapes)

    for tokens in (1, 8, 64):
        for tile in ((64, 4, 2), (64, 4, 3), (128, 8, 2), (32, 4, 2), (32, 2, 3)):
            values = dict(zip(("TILE_OUTPUTS", "TILE_WARPS", "TILE_STAGES"), tile, strict=True))
            attempt(f"nf4, {tokens} tokens", lowbit, values, products("nf4", tokens))
    for clients, length in ((1, 1000), (32, 500)):
        for shape in ((64, 8), (64, 4), (128, 8), (128, 4)):
            values = {"FEW_PROGRAMS": shape, "MANY_PROGRAMS": shape}
            attempt(f"attention, {clients} x {length}", fused, values, partial(time_attention, clients, length, where))
    return rows


def time_attention(clients: int, length: int, device: torch.device) -> float:
    """Seconds of one layer's attention of a decoding step at Phi-2's size."""
    from tinygptv.kernels import fused
    from tinygptv.kernels.shapes import AttentionWeights, Cache

    heads, dim = 32, 80
    layers = 8 if clients > 8 else 32
    shape = (clients, heads, length + 8, dim)
    caches = [
        Cache(*(torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))) for _ in range(layers)
    ]
    ones = torch.ones(dim, device=device)
    table_LH = torch.randn(length + 8, dim, device=device)
    bias = torch.zeros(3 * heads * dim, device=device)
    weights = AttentionWeights(bias, (ones, ones), (ones, ones), 1e-5, table_LH, table_LH, 32, dim**-0.5)
    qkv = torch.randn(1, clients, 3 * heads * dim, device=device, dtype=torch.bfloat16)
    slots = torch.arange(clients, device=device)
    lengths = torch.full((clients + 1,), length, device=device)

    def run() -> Tensor:
        for cache in caches:
            output = fused.attend(qkv, weights, cache, slots, lengths)
        return output

    return time_on_device(run, device, rounds=5) / layers
