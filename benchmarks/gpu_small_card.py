"""Answering on a small card: the whole system under a hard memory cap. Random weights, no Ray.

    python benchmarks/gpu.py --only small_card

One and four conversations about 448 px images fill their contexts of 1,024 tokens; image encoder, CUDA graphs and
cache are those of the server. Measured is the most that torch's allocator held, what it took from the device, and what
the device lacked in all, CUDA's own share included.
"""

from __future__ import annotations

import gc
import time

import numpy as np
import torch
from gpu_decode import SIZES, pack_language, random_model
from gpu_rows import GIB, Clock, Row, Rows, memory_cap, sentence
from serving_common import make_tokenizer

from tinygptv.inference.engine import Engine
from tinygptv.inference.graphed_encoder import GraphedEncoder
from tinygptv.inference.request import Request
from tinygptv.inference.sampling import SamplingParams
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

CAP_BYTES = 8 * GIB
MOST_GIB = 4.5
"""For one conversation."""


def small_card_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """Peak memory of one and four full contexts."""
    rows, where = Rows("small card"), torch.device(device)
    clock = Clock(rows, deadline_s)
    context = 1024 if size == "paper" else SIZES[size].context
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16} if where.type == "cuda" else {"fp32": torch.float32}
    for name, dtype in dtypes.items():
        for clients in (1, 4):
            what = f"NF4, {name}, {clients} x {context} tokens"
            if not clock.allows(what, 15.0 if size == "paper" else 0.1):
                continue
            gc.collect()
            model = random_model(SIZES[size].config(), where, dtype)
            pack_language(model, "nf4", dtype)
            try:
                with memory_cap(where, CAP_BYTES) as peak:
                    seconds = fill(model, clients, context)
            except RuntimeError as error:  # out of memory is one
                rows.put(what, None, "GiB", note=sentence(error))
                continue
            finally:
                del model
            note = f"reserved {peak.reserved / GIB:.2f} GiB; {seconds:.1f} s"
            rows.put(what, peak.allocated / GIB, "GiB", ceiling=MOST_GIB if clients == 1 else 8, note=note)
    return rows


def fill(model: TinyGPTVForConditionalGeneration, clients: int, context: int) -> float:
    """Answer so many questions about images until their contexts are full; returns the seconds."""
    started = time.perf_counter()
    device, config = model.device, model.config
    encoder = GraphedEncoder(model)
    engine = Engine(model, make_tokenizer(), max_batch_size=clients, context_length=context, runner="graph")
    if engine.max_batch_size < clients:
        raise RuntimeError(f"the cache holds {engine.max_batch_size} conversations, not {clients}")
    side, queries, token = config.vision_config.image_size, config.num_query_tokens, config.image_token_id
    rng = np.random.default_rng(0)
    for index in range(clients):
        pixels = torch.from_numpy(rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8))
        embeds = torch.stack(encoder.encode(pixels))
        text = rng.integers(1, token, context - queries - context // 8)
        ids = np.concatenate([text[:4], np.full(queries, token), text[4:]])
        with torch.inference_mode():
            inputs = model.embed(torch.from_numpy(ids).to(device).unsqueeze(0), image_embeds=embeds)[0]
        named = np.where(ids == token, -1 - index, ids)
        engine.add(Request(named, inputs, SamplingParams(max_tokens=context, ignore_end=True)))
    while engine.has_work:
        for _, delta in engine.step():
            if delta.error:
                raise RuntimeError(delta.error)
    return time.perf_counter() - started
