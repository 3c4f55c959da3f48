"""llama.cpp on Phi-2's sizes with random weights: what `cpu_decode.py system` is held against. Run the two in turn.

    python benchmarks/cpu_decode_llama.py --llama-bench PATH/llama-bench --format Q8_0 Q4_0

llama.cpp is no dependency. Its `llama-bench` is built from its sources (`cmake -B build && cmake --build build --target
llama-bench`), and the `gguf` package writes the files. Weights are random numbers of the right blocks, so nothing is
said about answers; the file has no vocabulary, which llama-bench does not need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from cpu_decode import ALL_WEIGHTS, LAYERS, SHAPES, VOCABULARY, WIDTH, read_bandwidth

HEADS, ROTARY, CONTEXT = 32, 32, 2048
BLOCK = 32
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18}
"""A block is a float16 scale and 32 numbers."""


def layer_shapes() -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every matrix that a token reads, and of the embedding."""
    yield "token_embd", VOCABULARY, WIDTH
    yield "output", VOCABULARY, WIDTH
    for layer in range(LAYERS):
        for name, (rows, columns) in zip(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), SHAPES, strict=True):
            yield f"blk.{layer}.{name}", rows, columns


def write_model(path: Path, kind: str) -> None:
    """A GGUF file of architecture ``phi2``; all matrices hold the same random blocks."""
    writer = gguf.GGUFWriter(path, "phi2", use_temp_file=False)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(ROTARY)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    quantization = gguf.GGMLQuantizationType[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (VOCABULARY * WIDTH // BLOCK, BLOCK_BYTES[kind]), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
    for name, rows, columns in layer_shapes():
        row_blocks = columns // BLOCK
        data = blocks[: rows * row_blocks].reshape(rows, row_blocks * BLOCK_BYTES[kind])
        writer.add_tensor(f"{name}.weight", data, raw_dtype=quantization)
        if name != "token_embd":
            writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))
    for name in ["output_norm", *(f"blk.{layer}.attn_norm" for layer in range(LAYERS))]:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--format", nargs="+", choices=BLOCK_BYTES, default=list(BLOCK_BYTES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    bandwidth = read_bandwidth()
    print(
        f"load before: {os.getloadavg()[0]:.1f}; {options.threads} threads read {bandwidth / 1e9:.1f} GB/s", flush=True
    )
    for kind in options.format:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "phi2.gguf"
            write_model(path, kind)
            command = [options.llama_bench, "-m", str(path), "-t", str(options.threads), "-r", "5", "-o", "json"]
            command += ["-p", str(options.prompt), "-n", str(options.tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        prefill, decode = (run["avg_ts"] for run in json.loads(done.stdout))
        read = ALL_WEIGHTS * BLOCK_BYTES[kind] / BLOCK
        print(
            f"llama.cpp {kind}: decoding {decode:.2f} tokens/s ({read / 1e9:.2f} GB of weights per token, "
            f"{read * decode / bandwidth:.0%} of the limit), prefill of {options.prompt} tokens {prefill:.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
