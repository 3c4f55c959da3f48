"""Answering on a GPU: the decoding step, the engine, the first token. Random weights, no Ray.

    python benchmarks/gpu.py --only decode,first_token,answers

``decode`` compares the bare decoding step, replayed as a CUDA graph, with the engine that serves (a thread of its own,
tokens delivered to one consumer per client). ``first_token`` takes an image to the first token of its answer.
``answers`` compares greedy answers with ``generate``.

The limit of a step is the time to read its weights once, and the cache of its sequences.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gpu_model import random_model as trainable_model
from gpu_rows import GIB, Clock, Row, Rows, sentence, synchronize
from serving_common import make_tokenizer
from torch import Tensor, nn

from tinygptv.config import TinyGPTVConfig
from tinygptv.inference.decoder import FlatDecoder
from tinygptv.inference.engine import Engine
from tinygptv.inference.engine_thread import EngineLoop
from tinygptv.inference.fused_layers import Span
from tinygptv.inference.graph_runner import GraphRunner, bucket_of
from tinygptv.inference.graphed_encoder import GraphedEncoder
from tinygptv.inference.request import Request
from tinygptv.inference.sampling import SamplingParams
from tinygptv.kernels.shapes import PackedWeight, pack_codes, pad_groups
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.quantization.linear_packed import PackedLinear, from_int4, from_int8

BITS = {"bf16": 16.0, "nf4": 4.25, "int4": 4.5, "int8": 8.0}
"""Bits that a weight of the language layers takes on the device, scales included; the head stays bf16."""
FLOORS = {("bf16", 1): 300, ("nf4", 1): 400, ("int4", 1): 400, ("bf16", 16): 3000, ("bf16", 32): 5500}
"""Tokens per second that the engine has to reach on an H100."""


@dataclass(frozen=True)
class Size:
    """How large a benchmark is."""

    context: int
    prompt: int
    tokens: int
    steps: int
    copy_bytes: int
    clients: tuple[int, ...]
    formats: tuple[str, ...]

    def config(self, image_size: int = 448) -> TinyGPTVConfig:
        return TinyGPTVConfig.phi2(image_size=image_size) if self.context > 256 else tiny_config()


SIZES: dict[str, Size] = {
    "paper": Size(512, 64, 160, 60, 4 * GIB, (1, 4, 16, 32), ("bf16", "nf4", "int4", "int8")),
    "tiny": Size(64, 8, 6, 2, 2**20, (1, 2), ("bf16", "nf4")),
}


# ---------------------------------------------------------------------------------------------------- the model


def random_model(config: TinyGPTVConfig, device: torch.device, dtype: torch.dtype) -> TinyGPTVForConditionalGeneration:
    """Random weights without adapters, ready for inference."""
    config.lora_rank = 0
    return trainable_model(config, device, dtype).requires_grad_(False).eval()


def random_layer(kind: str, outputs: int, inputs: int, bias: Tensor | None, device: torch.device) -> nn.Module:
    """A layer of random codes, as an artifact's files would give it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if kind == "int8":
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        tensors = {"weight": codes, "scale": torch.full((outputs,), 0.02 / 73, device=device)}
        return from_int8(tensors | ({} if bias is None else {"bias": bias}), device, dtype)
    group = min(64, inputs)
    if kind == "int4":
        pairs = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
        scales = torch.tensor([0.0043, 0.0], device=device).expand(inputs // group, outputs, 2)
        tensors = {"weight": pairs, "scale": scales.bfloat16()}
        return from_int4(tensors | ({} if bias is None else {"bias": bias}), device, dtype)
    codes = pack_codes(torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=device))
    scale = torch.full((outputs, inputs // group), 0.033, device=device, dtype=torch.float16)
    table_16 = torch.linspace(-1, 1, 16, device=device)
    return PackedLinear(PackedWeight(codes, pad_groups(scale, group), None, table_16, group, inputs), bias, dtype)


def pack_language(model: TinyGPTVForConditionalGeneration, kind: str, dtype: torch.dtype) -> None:
    """Put layers of random codes in place of the language layers' own; ``dtype`` is that of their products."""
    for name, module in list(model.language_model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("layers."):
            bias = None if module.bias is None else module.bias.detach()
            layer = random_layer(kind, module.out_features, module.in_features, bias, model.device)
            layer.dtype = dtype
            model.language_model.set_submodule(name, layer)


def time_on_device(function: Callable[[], Tensor], device: torch.device, rounds: int) -> float:
    """Seconds of a function's work, launched as a graph where there is a GPU; the median."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    with torch.inference_mode():
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        times = []
        for _ in range(rounds + 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times[1:])[rounds // 2]


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_on_device(lambda: target.copy_(source), device, rounds=5)
    return 2 * size / seconds


# ---------------------------------------------------------------------------------------------------- decoding


def decode_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """The bare step and the engine, for each format and number of clients."""
    rows, where = Rows("decode"), torch.device(device)
    clock, sizes = Clock(rows, deadline_s), SIZES[size]
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    rate = copy_rate(where, sizes.copy_bytes)
    for kind in sizes.formats:
        if not clock.allows(f"{kind}", 15.0 if size == "paper" else 0.1):
            break
        try:
            model = random_model(sizes.config(), where, dtype)
            if kind != "bf16":
                pack_language(model, kind, dtype)
            _decode_cases(rows, clock, sizes, kind, model, rate)
        except Exception as error:  # the other formats must still run
            traceback.print_exc()
            rows.put(kind, None, "tokens/s", note=sentence(error))
        model = None
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _decode_cases(
    rows: Rows, clock: Clock, sizes: Size, kind: str, model: TinyGPTVForConditionalGeneration, rate: float
) -> None:
    started = time.perf_counter()
    engine = Engine(
        model, make_tokenizer(), max_batch_size=sizes.clients[-1], context_length=sizes.context, runner="graph"
    )
    synchronize(engine.decoder.device)
    ready_s = time.perf_counter() - started
    text = model.config.text_config
    head = text.hidden_size * text.vocab_size
    layers = text.num_hidden_layers * (4 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size)
    weights = layers * BITS[kind] / 8 + 2 * head
    bare = {}
    for clients in sizes.clients:
        seconds, length = bare_step(engine, clients, sizes)
        bare[clients] = seconds
        cache = clients * length * 4 * text.num_hidden_layers * text.hidden_size
        limit = (weights + cache) / rate
        note = f"{seconds * 1e3:.2f} ms at {length} positions; limit {limit * 1e3:.2f} ms, {limit / seconds:.0%} of it"
        rows.put(f"{kind}, bare step, {clients}", clients / seconds, "tokens/s", note=note)
    loop = EngineLoop(engine)
    for clients in sizes.clients:
        if not clock.allows(f"{kind}, engine, {clients}", 3.0 if sizes.context > 256 else 0):
            continue
        per_second = serve(loop, clients, sizes)
        note = f"{bare[clients] * per_second / clients:.0%} of the bare step's rate while all answer"
        note += f"; graphs captured in {ready_s:.0f} s" if clients == sizes.clients[0] else ""
        floor = FLOORS.get((kind, clients)) if sizes.context > 256 else None
        rows.put(f"{kind}, engine, {clients}", per_second, "tokens/s", floor=floor, note=note)
    loop.close()


def bare_step(engine: Engine, clients: int, sizes: Size) -> tuple[float, int]:
    """Seconds of the replayed step of so many sequences, and the length of their caches in the middle."""
    runner = engine.runner
    assert isinstance(runner, GraphRunner)
    first = sizes.prompt
    runner.lengths_G.fill_(first)
    runner.lengths_G[-1] = 0
    slots = list(range(clients))
    runner._place(slots)
    step = runner._step(bucket_of(clients))
    replay = step._decode
    with torch.inference_mode():
        replay()
        synchronize(runner.device)
        started = time.perf_counter()
        for _ in range(sizes.steps):
            replay()
        synchronize(runner.device)
        seconds = (time.perf_counter() - started) / sizes.steps
    runner._rows = []
    return seconds, first + sizes.steps // 2


def serve(loop: EngineLoop, clients: int, sizes: Size) -> float:
    """Tokens per second while all clients answer: from the last one's first token to the first one's end."""
    rng = np.random.default_rng(clients)
    arrivals: list[list[float]] = [[] for _ in range(clients)]

    def consume(index: int) -> None:
        ids = rng_ids[index]
        embeds = loop.engine.decoder.embed(torch.from_numpy(ids).to(loop.engine.decoder.device))
        request = Request(ids, embeds, SamplingParams(max_tokens=sizes.tokens, ignore_end=True))
        for delta in loop.iterate(request):
            now = time.perf_counter()
            arrivals[index] += [now] * len(delta.token_ids)

    words = loop.engine.decoder.model.config.image_token_id
    rng_ids = [rng.integers(1, words, sizes.prompt) for _ in range(clients)]
    threads = [threading.Thread(target=consume, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    during = sum(begin < moment <= end for times in arrivals for moment in times)
    return during / max(end - begin, 1e-9)


# ---------------------------------------------------------------------------------------------------- first token


def first_token_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """From an image of the model's size to the first token of an answer about it."""
    rows, where = Rows("first_token"), torch.device(device)
    sizes = SIZES[size]
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = random_model(sizes.config(), where, dtype)
    engine = Engine(model, make_tokenizer(), max_batch_size=2, context_length=sizes.context, runner="graph")
    encoder, loop = GraphedEncoder(model), EngineLoop(engine)
    side, queries = model.config.vision_config.image_size, model.config.num_query_tokens
    token = model.config.image_token_id
    rng = np.random.default_rng(0)
    times: list[tuple[float, float]] = []
    for turn in range(8):
        pixels = torch.from_numpy(rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8))
        question = rng.integers(1, token, 24)
        started = time.perf_counter()
        embeds = encoder.encode(pixels)
        encoded = time.perf_counter()
        ids = np.concatenate([question[:4], np.full(queries, token), question[4:]])
        with torch.inference_mode():
            inputs = model.embed(torch.from_numpy(ids).to(where).unsqueeze(0), image_embeds=torch.stack(embeds))[0]
        named = np.where(ids == token, -1 - turn, ids)
        next(iter(loop.iterate(Request(named, inputs, SamplingParams(max_tokens=2, ignore_end=True)))))
        times.append((time.perf_counter() - started, encoded - started))
    loop.close()
    total, encoding = (float(np.median(column)) for column in zip(*times[2:], strict=True))
    note = f"median of {len(times) - 2}; the image {encoding * 1e3:.0f} ms; slowest {max(times[2:])[0] * 1e3:.0f} ms"
    rows.put("image to first token, 1 client", total * 1e3, "ms", ceiling=60, note=note)
    return rows


# ---------------------------------------------------------------------------------------------------- answers


PROMPTS, ANSWER = 4, 12
"""Prompts, and tokens of each answer."""


def answers_section(deadline_s: float, size: str, device: str) -> list[Row]:
    """Greedy answers of the engine and of ``generate``; logits of a step in static shapes and of the model."""
    rows, where = Rows("answers"), torch.device(device)
    sizes = SIZES[size]
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" and where.type != "cuda":
            continue
        config = sizes.config()
        if size == "paper":
            config.text_config.num_hidden_layers = 8
            config.vision_config.num_hidden_layers = 1
        model = random_model(config, where, dtype)
        model.lm_head.weight.normal_(0, 0.3)
        engine = Engine(model, make_tokenizer(), max_batch_size=PROMPTS, context_length=sizes.context, runner="graph")
        rng = np.random.default_rng(1)
        words = model.config.image_token_id
        prompts = [rng.integers(1, words, int(rng.integers(5, sizes.prompt))) for _ in range(PROMPTS)]
        keys = {}
        for ids in prompts:
            embeds = engine.decoder.embed(torch.from_numpy(ids).to(where))
            keys[engine.add(Request(ids, embeds, SamplingParams(max_tokens=ANSWER, ignore_end=True)))] = ids
        answers: dict[int, list[int]] = {}
        while engine.has_work:
            for key, delta in engine.step():
                answers.setdefault(key, []).extend(delta.token_ids)
        same = 0
        for key, ids in keys.items():
            wanted = _generate(model, ids, ANSWER)
            same += int(answers[key] == wanted)
        rows.put(f"{name}: equal answers of {PROMPTS}", same, "answers", floor=PROMPTS if name == "fp32" else None)
        rows.put(f"{name}: largest difference of logits", _logit_difference(model, prompts, where, sizes), "of 1 sigma")
        del model, engine
    return rows


def _generate(model: TinyGPTVForConditionalGeneration, ids: np.ndarray, count: int) -> list[int]:
    prompt = torch.from_numpy(ids).to(model.device)[None]
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


@torch.inference_mode()
def _logit_difference(
    model: TinyGPTVForConditionalGeneration, prompts: Sequence[np.ndarray], device: torch.device, sizes: Size
) -> float:
    """Largest difference of one batched step's logits from the model's own, in standard deviations of the logits."""
    runner = GraphRunner(FlatDecoder(model, len(prompts), sizes.context), use_graphs=False)
    for slot, ids in enumerate(prompts):
        embeds = runner.decoder.embed(torch.from_numpy(ids[:-1]).to(device))
        runner.layers.prefill(embeds, [Span(slot, 0, len(ids) - 1)], [])
        runner.tokens_G[slot], runner.lengths_G[slot] = int(ids[-1]), len(ids) - 1
    logits = runner.layers.decode(torch.arange(len(prompts), device=device), runner.tokens_G, runner.lengths_G)
    worst = 0.0
    for row, ids in enumerate(prompts):
        expected = model(input_ids=torch.from_numpy(ids).to(device)[None]).logits[0, -1]
        worst = max(worst, float((logits[row] - expected).abs().max() / expected.std()))
    return worst
