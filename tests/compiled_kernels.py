"""Compile the Triton kernels at the paper's size for a card that is not there; prints what each takes of it.

``python -m tests.compiled_kernels 86 bf16`` stands for compute capability 8.6. A line for each compiled kernel: name,
bytes of shared memory, bytes of registers that did not fit (the stack).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tinygptv.kernels import fused, lowbit, lowbit_rows, training_heads, training_rows
from tinygptv.kernels.shapes import AttentionWeights, Branch, Cache, PackedWeight

D, MLP, N, H, ROTARY = 2560, 10240, 32, 80, 32
"""Phi-2."""
CONTEXT, VOCABULARY = 2048, 51200
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class AbsentCard:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_all(capability, dtype):
    """Call every kernel's function as the model does; kernels are compiled and not launched."""
    driver.set_active(AbsentCard(capability))
    launch, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(self.fn.__name__, kernel.metadata.shared, stack_bytes(kernel.asm["cubin"]), flush=True)

    JITFunction.run = compile_only
    # As on a card: no table in memory.
    lowbit._lookup = lambda weight, dtype=torch.bfloat16: lowbit._known(weight, dtype)[1]
    for module in (training_rows, training_heads):
        module.num_programs = lambda x, per_multiprocessor: per_multiprocessor * 82
    answer(dtype)
    multiply(dtype)
    train(dtype)


def stack_bytes(cubin):
    """Bytes of a thread's stack, where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return int(re.search(r"STACK:(\d+)", told.stdout)[1])


def answer(dtype):
    """A step of one client with partial products of 4-bit matrices, and of 32 with 16-bit ones."""
    attention = AttentionWeights(
        torch.empty(3 * N * H), *[(torch.empty(H), torch.empty(H))] * 2, 1e-5, torch.empty(CONTEXT, H),
        torch.empty(CONTEXT, H), ROTARY, H**-0.5,
    )  # fmt: skip
    for tokens, parts in ((1, 8), (32, 1)):
        kind = dtype if parts == 1 else torch.float32
        stream, norm = torch.empty(tokens, D), torch.empty(D)
        branches = tuple(Branch(torch.empty(parts, tokens, D, dtype=kind), norm, rms) for rms in (norm, None))
        fused.add_norm(stream, branches, norm, norm, 1e-5, dtype)
        fused.add_norm(stream, None, norm, norm, 1e-5, dtype)
        fused.bias_gelu(torch.empty(parts, tokens, MLP, dtype=kind), torch.empty(MLP), dtype)
        cache = Cache(*(torch.empty(tokens, N, CONTEXT, H, dtype=dtype) for _ in range(2)))
        qkv, rows = torch.empty(parts, tokens, 3 * N * H, dtype=kind), torch.zeros(tokens, dtype=torch.int64)
        fused.rotate_and_store(qkv, attention, cache, rows, rows)
        fused.attend(qkv, attention, cache, rows, rows)


def multiply(dtype):
    """Products with NF4 (groups of 64), int4 (128, with offsets) and int8 matrices: a few tokens, and the most."""
    for ops, tokens in ((lowbit, 1), (lowbit, 64), (lowbit_rows, 1), (lowbit_rows, 4)):
        x = torch.empty(tokens, D, dtype=dtype)
        codes, table = torch.empty(VOCABULARY, D // 8, dtype=torch.int32), torch.linspace(-1, 1, 16)
        for group in (64, 128):
            scale = torch.empty(VOCABULARY, D // group, dtype=dtype)
            weight = PackedWeight(codes, scale, scale if group == 128 else None, table, group, D)
            ops.partial_products(x, weight)
            ops.unpack(weight, dtype)
        codes = torch.empty(VOCABULARY, D, dtype=torch.int8)
        ops.partial_products(x, PackedWeight(codes, torch.empty(VOCABULARY, 1), None, None, D, D))


def train(dtype):
    """A layer's forward and backward pass, with dropout."""
    tokens, p = 64 * 65, 0.05
    stream, norm, sums = torch.empty(1, tokens, D), torch.empty(D), torch.empty(tokens)
    seeds = torch.empty(4, dtype=torch.int64)
    branch = torch.empty(1, tokens, D, dtype=dtype)
    training_rows.norm_and_drop(stream, norm, norm, 1e-5, seeds, 0, p, dtype)
    grads = (stream, branch, branch, branch)
    training_rows.norm_and_drop_backward(stream, norm, sums, sums, seeds, 0, p, grads, True, True)
    training_rows.add_branches(stream, branch, norm, 1e-6, branch, seeds, (2, 3), p)
    training_rows.add_branches_backward(stream, branch, norm, sums, seeds, (2, 3), p, True)
    training_rows.drop(branch, seeds, 1, p)
    training_rows.drop_backward(branch, branch, seeds, 1, p)
    qkv, head, angles = torch.empty(1, tokens, 3 * N * H, dtype=dtype), torch.empty(H), torch.empty(1, tokens, ROTARY)
    training_heads.rotate_heads(qkv, (head, head), (head, head), 1e-5, angles, angles, N)
    grads = tuple(torch.empty(tokens, N, H, dtype=dtype) for _ in range(3))
    training_heads.rotate_heads_backward(qkv, head, head, 1e-5, angles, angles, grads, True, True)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]), {"bf16": torch.bfloat16, "fp16": torch.float16}[sys.argv[2]])
