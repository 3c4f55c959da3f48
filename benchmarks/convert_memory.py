#!/usr/bin/env python3
"""Peak memory of ``python -m tinygptv.convert release``: does it stream?

    python benchmarks/convert_memory.py --scale 0.25 --tokenizer DIR --work DIR   # a quarter of the layers
    python benchmarks/convert_memory.py --scale 1 --tokenizer DIR --work DIR      # all 3.9 billion, 16 GB of disk

Writes random files in the release's layouts (float16), converts them in a process of its own, and compares that
process's peak resident memory with the size of the largest file, the language model. Beside it: what ``torch.load`` of
that file alone takes, the least that a conversion needs which reads files whole. The claim: below 1.3 times the largest
part.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tinygptv.config import EvaVisionConfig, TinyGPTVConfig
from tinygptv.convert.layouts import plain_key, release_key
from tinygptv.model.meta import build_on_meta

FILES = {
    "vision": "eva_vit_g.pth",
    "qformer": "blip2.pth",
    "language": "phi-2/pytorch_model.bin",
    "checkpoint": "stage.pth",
}
"""Role -> file."""
TRAINED = ("projector.", ".lora_", "layernorm.weight", "rmsnorm.weight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.25, help="share of the layers of every part")
    parser.add_argument("--work", type=Path, required=True, help="empty folder with room for twice the model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Phi-2's tokenizer")
    parser.add_argument("--keep", action="store_true", help="leave the files in place")
    arguments = parser.parse_args()
    files = write_files(scaled_config(arguments.scale), arguments.work)
    largest = max(path.stat().st_size for path in files.values())
    whole = measure([sys.executable, "-c", _LOAD_WHOLE, str(files["language"])])
    convert = [sys.executable, "-m", "tinygptv.convert", "release", "--dtype=float16"]
    convert += [f"--{role}={path.parent if role == 'language' else path}" for role, path in files.items()]
    convert += [f"--tokenizer={arguments.tokenizer}", f"--output={arguments.work / 'checkpoint'}"]
    ours = measure(convert)
    base = measure([sys.executable, "-c", "import tinygptv.convert.__main__"])
    measured = {
        "scale": arguments.scale,
        "file_bytes": {role: path.stat().st_size for role, path in files.items()},
        "largest_file_bytes": largest,
        "convert_peak_bytes": ours["peak_bytes"],
        "convert_peak_over_largest": round(ours["peak_bytes"] / largest, 3),
        "imports_alone_peak_bytes": base["peak_bytes"],
        "torch_load_of_largest_peak_bytes": whole["peak_bytes"],
        "convert_seconds": ours["seconds"],
    }
    print(json.dumps(measured, indent=1))
    if not arguments.keep:
        shutil.rmtree(arguments.work)
    return 0


def scaled_config(scale: float) -> TinyGPTVConfig:
    """The paper's widths, and a share of its depth."""
    config = TinyGPTVConfig.phi2()
    vision = EvaVisionConfig(num_hidden_layers=max(round(39 * scale), 1))
    text = {**config.text_config.to_dict(), "num_hidden_layers": max(round(32 * scale), 1)}
    return TinyGPTVConfig(vision_config=vision, text_config=text)


def write_files(config: TinyGPTVConfig, work: Path) -> dict[str, Path]:
    """Random release files, one part after another."""
    work.mkdir(parents=True, exist_ok=True)
    shapes = {plain_key(name): tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    paths = {}
    for role, file in FILES.items():
        state = {}
        for name, shape in shapes.items():
            trained = any(mark in name for mark in TRAINED)
            if role == "checkpoint":
                chosen = trained and name.startswith(("projector.", "language_model."))
            elif role == "qformer":
                chosen = name.startswith(("qformer.", "vision_encoder.ln_vision"))
            elif role == "language":
                added = "q_layernorm" in name or "k_layernorm" in name or "rmsnorm" in name
                chosen = name.startswith(("language_model.", "lm_head.")) and ".lora_" not in name and not added
            else:
                chosen = name.startswith("vision_encoder.vit.")
            if chosen:
                key = release_key(name, lora=role == "checkpoint")[0]
                key = key.removeprefix("visual_encoder.") if role == "vision" else key
                key = key.removeprefix("llama_model.") if role == "language" else key
                dtype = torch.float32 if role == "checkpoint" else torch.float16
                state[key] = torch.empty(shape, dtype=dtype).uniform_(-0.05, 0.05)
        paths[role] = work / file
        paths[role].parent.mkdir(exist_ok=True)
        torch.save({"model": state} if role != "vision" else state, paths[role])
    text = config.text_config
    (work / "phi-2/config.json").write_text(json.dumps({"num_attention_heads": text.num_attention_heads}))
    return paths


_LOAD_WHOLE = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; its peak resident memory and wall time, asked of the kernel by a process in between."""
    code = (
        "import json, resource, subprocess, sys, time; start = time.time(); "
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024; "
        "print(json.dumps({'peak_bytes': peak, 'seconds': round(time.time() - start, 1), 'status': done.returncode}))"
    )
    output = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    measured = json.loads(output.stdout)
    if measured["status"]:
        raise SystemExit(f"{' '.join(command)} failed:\n{output.stderr}")
    return measured


if __name__ == "__main__":
    raise SystemExit(main())
