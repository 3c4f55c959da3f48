#!/usr/bin/env python3
"""All claims about GPUs in one call: answering, training, memory. Random weights at the paper's size, no Ray.

    python benchmarks/gpu.py                                 # about eight minutes on an H100
    python benchmarks/gpu.py --only decode,train             # some sections
    python benchmarks/gpu.py --size tiny --device cpu        # the same code in seconds
    python benchmarks/gpu.py --output benchmarks/results/gpu.md

Needs torch 2.11 or newer, transformers, timm and peft. Each section has a time limit; what does not fit is said in the
table. Numbers are printed as lines of JSON as they come, and at the end as one table with the wanted values beside
them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when torch is loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_decode import answers_section, decode_section, first_token_section
from gpu_kernels import kernels_section, products_section, tuning_section
from gpu_memory import memory_section
from gpu_rows import Row, table
from gpu_small_card import small_card_section
from gpu_train import train_section
from note import versions

Section = Callable[[float, str, str], list[Row]]
SECTIONS: dict[str, tuple[Section, float]] = {
    "decode": (decode_section, 110),
    "train": (train_section, 120),
    "memory": (memory_section, 110),
    "small_card": (small_card_section, 60),
    "first_token": (first_token_section, 30),
    "answers": (answers_section, 60),
    "products": (products_section, 30),
    "kernels": (kernels_section, 40),
    "tuning": (tuning_section, 60),
}
"""Section -> its function and time limit in seconds."""
DEFAULT = ("decode", "train", "memory", "small_card", "first_token", "answers", "products")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(DEFAULT), help=f"sections, by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--size", choices=("paper", "tiny"), default="paper")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit-s", type=float, help="seconds of each section, instead of its own limit")
    parser.add_argument("--output", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--only names {unknown[0]!r}; there are: {', '.join(SECTIONS)}.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA card here; --size tiny --device cpu runs the same code.")
    rows: list[Row] = []
    for name in names:
        section, limit_s = SECTIONS[name]
        try:
            rows += section(arguments.limit_s or limit_s, arguments.size, arguments.device)
        except Exception:  # the other sections must still run
            traceback.print_exc()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    text = f"# gpu\n\n{description(arguments)}\n\n{table(rows)}\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    return 0


def description(arguments: argparse.Namespace) -> str:
    """Command, date, card and versions."""
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    found = versions(("torch", "triton", "transformers", "timm", "peft"))
    return (
        f"- Command: `{' '.join(['python benchmarks/gpu.py', *sys.argv[1:]])}`\n"
        f"- {card}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {found}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
