"""How fast Phi-2's size decodes on a CPU, by way of storing the weights; and the whole system's memory and answer time.

    python benchmarks/cpu_decode.py linear                  every low-bit path on Phi-2's matrices
    python benchmarks/cpu_decode.py encoder --image-size 448    the vision encoder with and without C functions
    python benchmarks/cpu_decode.py system --method cpu     a paper-scale artifact: written, loaded, asked
    python benchmarks/cpu_decode.py system --method cpu4

Weights are random, so nothing is said about answers. ``linear`` times the matrix products alone, on two of Phi-2's 32
layers (each path has weights of its own, more than the caches hold), and scales to 32 layers and the head by the number
of weights. ``system`` takes everything: 3.9 billion parameters, exported by the code that exports trained ones, loaded
in a process of its own, asked through the engine. The limit is the time to read the weights once per token.

OpenVINO is timed where it is installed; it is no dependency.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from note import peak_memory, seconds_of
from serving_common import make_questions, make_tokenizer
from torch import Tensor, nn

from tinygptv import TinyGPTVConfig, TinyGPTVForConditionalGeneration, TinyGPTVProcessor

WIDTH, VOCABULARY, LAYERS = 2560, 51200, 32
SHAPES = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
"""Output and input widths of a layer's matrices: q, k, v together; dense; fc1; fc2."""
LAYER_WEIGHTS = sum(o * i for o, i in SHAPES)
ALL_WEIGHTS = LAYERS * LAYER_WEIGHTS + VOCABULARY * WIDTH
TIMED_LAYERS, TIMED_BLOCKS = 2, 4

Product = Callable[[Tensor], object]


def read_bandwidth(repeats: int = 7) -> float:
    """Bytes per second that all threads together read: the best of some sums over 1 GB."""
    numbers = torch.ones(2**27, dtype=torch.int64)
    best = min(seconds_of(numbers.sum) for _ in range(repeats))
    return numbers.nbytes / best


# ---------------------------------------------------------------------------------------------------- linear layers


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _dense(dtype: torch.dtype) -> Callable[[Tensor], Product]:
    def build(weight: Tensor) -> Product:
        layer = _linear(weight.to(dtype, copy=True))
        return lambda x: layer(x.to(dtype))

    return build


def _ours(name: str) -> Callable[[Tensor], Product]:
    def build(weight: Tensor) -> Product:
        from tinygptv.quantization.artifact import format_class

        kind = format_class(name)
        return kind.restore(kind.pack(_linear(weight), "cpu"), "cpu", torch.float32)

    return build


def _fbgemm(weight: Tensor) -> Product:
    from tinygptv.quantization.linear_cpu import round_rows
    from tinygptv.quantization.torch_products import FbgemmInt8

    return FbgemmInt8(*round_rows(weight), None)


def _aten4(weight: Tensor) -> Product:
    from tinygptv.quantization.linear_cpu import INT4_GROUPS, round_groups
    from tinygptv.quantization.torch_products import AtenInt4

    return AtenInt4(*round_groups(weight, INT4_GROUPS[0]), None)


def _dynamic(weight: Tensor) -> Product:
    holder = nn.Sequential(_linear(weight))
    return torch.ao.quantization.quantize_dynamic(holder, {nn.Linear}, torch.qint8)


def _int8pack(weight: Tensor) -> Product:
    from tinygptv.quantization.linear_cpu import round_rows

    numbers, scale = round_rows(weight)
    scale = scale.bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), numbers, scale)


def _openvino(bits: int) -> Callable[[Tensor], Product]:
    def build(weight: Tensor) -> Product:
        import openvino as ov
        from openvino import opset14 as op

        rows, columns, group = *weight.shape, 128
        data = np.random.default_rng(0).integers(0, 256, rows * columns // 2, dtype=np.uint8)
        x = op.parameter([-1, columns], ov.Type.f32)
        if bits == 4:
            numbers = op.constant(ov.Tensor(data, ov.Shape([rows, columns // group, group]), ov.Type.i4))
            scales = op.constant(np.full((rows, columns // group, 1), 0.01, np.float16))
        else:
            numbers = op.constant(np.random.default_rng(0).integers(-127, 128, (rows, columns)).astype(np.int8))
            scales = op.constant(np.full((rows, 1), 0.01, np.float16))
        product = op.multiply(op.convert(numbers, ov.Type.f16), scales)
        flat = op.reshape(product, op.constant(np.array([rows, columns])), False)
        model = ov.Model([op.matmul(x, op.convert(flat, ov.Type.f32), False, True)], [x])
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,
        }
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        # The model reads ``data`` where it lies, so the function holds it.
        return lambda inputs, data=data: request.infer([inputs.numpy()])

    return build


PATHS: dict[str, tuple[float, Callable[[Tensor], Product]]] = {
    "float32": (32, _dense(torch.float32)),
    "bfloat16": (16, _dense(torch.bfloat16)),
    "int8, C functions of this project (method=cpu)": (8, _ours("int8")),
    "int8, FBGEMM, scale per token": (8, _fbgemm),
    "int8, torch quantize_dynamic": (8, _dynamic),
    "int8, aten _weight_int8pack_mm, bfloat16": (8, _int8pack),
    "int8, bitsandbytes": (8, _ours("llm_int8")),
    "4 bits, C functions of this project (method=cpu4)": (4.5, _ours("int4")),
    "4 bits, aten _weight_int4pack_mm": (4.5, _aten4),
    "4 bits, bitsandbytes NF4": (4.13, _ours("nf4")),
    "int8, OpenVINO": (8, _openvino(8)),
    "4 bits, OpenVINO, groups of 128": (4.125, _openvino(4)),
}


def bench_linear(options: argparse.Namespace) -> None:
    bandwidth = read_bandwidth()
    print(f"{options.threads} threads read {bandwidth / 1e9:.1f} GB/s\n")
    print("| path | bits | ms per token | tokens/s | share of its limit | ms per token of 4 | prefill tokens/s (64) |")
    print("|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    weights = [torch.randn(o, i).mul_(0.02) for _ in range(TIMED_LAYERS) for o, i in SHAPES]
    scale = ALL_WEIGHTS / (TIMED_LAYERS * LAYER_WEIGHTS)
    for name, (bits, build) in PATHS.items():
        if not any(part in name for part in options.only or [""]):
            continue
        try:
            with torch.inference_mode():
                products = [build(weight) for weight in weights]
                one, four, many = (scale * _time(products, weights, rows) for rows in (1, 4, 64))
        except (ImportError, ValueError) as error:
            print(f"| {name} | {bits:g} | not run: {error} |")
            continue
        limit = ALL_WEIGHTS * bits / 8 / bandwidth
        cells = [f"{one * 1e3:.0f}", f"{1 / one:.2f}", f"{limit / one:.0%}", f"{four * 1e3:.0f}", f"{64 / many:.0f}"]
        print(f"| {name} | {bits:g} | {' | '.join(cells)} |", flush=True)


def _time(products: list[Product], weights: list[Tensor], rows: int) -> float:
    """Median seconds of all products on so many rows, within a second or two."""
    inputs = [torch.randn(rows, weight.shape[1]) for weight in weights]

    def once() -> None:
        for product, x in zip(products, inputs, strict=True):
            product(x)

    once()
    times = [seconds_of(once)]
    while len(times) < 9 and sum(times) < 2:
        times.append(seconds_of(once))
    return float(np.median(times))


# ---------------------------------------------------------------------------------------------------------- encoder


def bench_encoder(options: argparse.Namespace) -> None:
    """Some of ViT-g's blocks with int8 weights, scaled to all of them.

    ``torch``: products by oneDNN, all else by torch. ``host``: all of it by this project's kernels. ``host, torch
    attention``: these without attention.
    """
    from tinygptv.quantization.encoder_block import HostEncoderBlock
    from tinygptv.quantization.linear_cpu import Int8EncoderLinear, Int8Linear
    from tinygptv.quantization.torch_products import OnednnInt8

    encoder = random_model(options.image_size).vision_encoder
    depth = len(encoder.vit.blocks)
    encoder.vit.blocks = encoder.vit.blocks[:TIMED_BLOCKS]
    for block in encoder.vit.blocks:
        block.attn.k_bias = torch.zeros_like(block.attn.v_bias)  # a buffer, which random_model leaves on meta
    pixels = torch.randn(1, 3, options.image_size, options.image_size)
    ways = {}
    for name in ("torch", "host, torch attention", "host"):
        way = copy.deepcopy(encoder)
        for path, layer in list(way.named_modules()):
            if type(layer) is nn.Linear:
                stored = Int8Linear.pack(layer, "cpu")
                packed = Int8EncoderLinear.restore(stored, "cpu", torch.float32)
                if name == "torch":
                    packed.product = OnednnInt8(stored["weight"], stored["scale"], packed.bias)
                way.set_submodule(path, packed)
        for index, block in enumerate(way.vit.blocks):
            block.attn.qkv_bias_separate = True
            if name != "torch":
                way.vit.blocks[index] = HostEncoderBlock(block)
                way.vit.blocks[index].has_host_attention &= name == "host"
        ways[name] = way
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        exact = encoder(pixels)
        drift = {name: ((way(pixels) - exact).norm() / exact.norm()).item() for name, way in ways.items()}
        for _ in range(5):
            for name, way in ways.items():
                seconds[name].append(seconds_of(functools.partial(way, pixels)) * depth / TIMED_BLOCKS)
    for name, found in seconds.items():
        print(
            f"{name}: {np.median(found):.2f} s for {depth} blocks (least {min(found):.2f}); features of {TIMED_BLOCKS} "
            f"blocks differ from float32's by {drift[name]:.1e} of their norm"
        )


# ---------------------------------------------------------------------------------------------------- the whole system


def random_model(image_size: int) -> TinyGPTVForConditionalGeneration:
    """The paper's sizes; all matrices are windows on the same random numbers, so it takes half a gigabyte."""
    config = TinyGPTVConfig.phi2(image_size=image_size, lora_rank=0)
    with torch.device("meta"):
        model = TinyGPTVForConditionalGeneration(config)
    numbers = torch.randn(VOCABULARY * WIDTH, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 1:
                is_norm = "norm" in type(module).__name__.lower() and name == "weight"
                value = torch.full(parameter.shape, float(is_norm))
            else:
                value = numbers[: parameter.numel()].view(parameter.shape)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.eval()


def bench_system(options: argparse.Namespace) -> None:
    from tinygptv.checkpoint.folders import write_folder
    from tinygptv.quantization.artifact import write_artifact

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "artifact"

        def fill(staging: Path) -> None:
            model = random_model(options.image_size)
            processor = TinyGPTVProcessor.from_config(model.config, make_tokenizer())
            metadata = write_artifact(staging, model, processor, options.method)
            print(f"{options.method}: {metadata['bytes'] / 1e9:.2f} GB stored", flush=True)

        print(f"written in {seconds_of(lambda: write_folder(folder, fill)):.0f} s", flush=True)
        child = [sys.executable, __file__, "ask", "--folder", str(folder)]
        for name in ("threads", "batch", "image_size", "context", "kv_cache_dtype"):
            child += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        subprocess.run(child, check=True)


def ask(options: argparse.Namespace) -> None:
    """Load an artifact and measure it; runs in a process of its own, whose memory is counted."""
    from tinygptv.data.conversation import ChatMessage
    from tinygptv.inference.assistant import Assistant
    from tinygptv.inference.loading import load_for_inference
    from tinygptv.inference.sampling import SamplingParams

    process = psutil.Process()
    before = process.memory_info().rss
    started = time.perf_counter()
    model, processor = load_for_inference(options.folder)
    seconds = time.perf_counter() - started
    loaded = process.memory_info().rss
    print(
        f"loaded in {seconds:.1f} s; resident {loaded / 1e9:.2f} GB, {before / 1e9:.2f} of them libraries", flush=True
    )
    assistant = Assistant(
        model,
        processor,
        max_batch_size=options.batch,
        context_length=options.context,
        kv_cache_dtype=options.kv_cache_dtype,
    )

    def stream(seed: int, num_tokens: int) -> Iterator[tuple[float, int]]:
        """Seconds since the question, and tokens so far."""
        (question,) = make_questions(1, 1, seed)
        asked, count = time.perf_counter(), 0
        message = ChatMessage("user", question.text, (assistant.open(question.image),))
        for delta in assistant.iterate([message], SamplingParams(max_tokens=num_tokens, ignore_end=True)):
            count += len(delta.token_ids)
            yield time.perf_counter() - asked, count

    list(stream(99, 2))  # the first use of every kernel
    arrivals = list(stream(0, 24))
    gaps = np.diff([at for at, _ in arrivals])
    reuse = time.perf_counter()
    list(stream(0, 1))
    reuse = time.perf_counter() - reuse
    metadata = json.loads((Path(options.folder) / "quantization.json").read_text())["parts"]
    read = (
        metadata["language_model"]["bytes"] + metadata["lm_head"]["bytes"] - 2 * VOCABULARY * WIDTH
    )  # not the embedding
    assistant.engine.decoder.cache.fill_(0)  # touches every page: the memory of full contexts
    full = process.memory_info().rss
    peak = peak_memory()
    print(
        f"resident with {options.batch} full contexts of {options.context} tokens: {full / 1e9:.2f} GB; "
        f"peak since the start, loading included: {peak / 1e9:.2f} GB"
    )
    bandwidth = read_bandwidth()
    token = float(np.median(gaps))
    print(
        f"an image of {options.image_size} px and an answer of 24 tokens: {arrivals[-1][0]:.2f} s, first token after "
        f"{arrivals[0][0]:.2f} s (again with image and prompt cached: {reuse:.2f} s)"
    )
    print(
        f"decoding: {1 / token:.2f} tokens/s ({token * 1e3:.0f} ms each), {read / 1e9:.2f} GB of weights per token: "
        f"{read / token / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s, {read / bandwidth / token:.0%} of the limit",
        flush=True,
    )
    assistant.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("linear", "encoder", "system", "ask"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", help="linear: paths whose names hold one of these")
    parser.add_argument("--method", default="cpu", help="system: how the artifact is stored")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1, help="system: cache slots")
    parser.add_argument("--context", type=int, default=1024, help="system: tokens of each slot")
    parser.add_argument("--kv-cache-dtype", default="auto", help="system: of keys and values")
    parser.add_argument("--folder", help="ask: an artifact")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{options.what}, {options.threads} threads, torch {torch.__version__}, load before: {os.getloadavg()[0]:.1f}"
    )
    {"linear": bench_linear, "encoder": bench_encoder, "system": bench_system, "ask": ask}[options.what](options)


if __name__ == "__main__":
    main()
