"""Command line of ``python -m tinygptv.convert``: conversions that stream, tensor by tensor, from file to file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinygptv.checkpoint.checkpoint import STAGE_FILE, CheckpointError, verify_folder, write_folder
from tinygptv.checkpoint.model_card import model_card
from tinygptv.checkpoint.weight_files import WeightFileError, open_weights
from tinygptv.config import TinyGPTVConfig
from tinygptv.convert.layouts import interleave_heads, plain_key, release_key, split_phi_tensors
from tinygptv.convert.load import build_fresh
from tinygptv.convert.match import Release, match_release
from tinygptv.data.processing import TinyGPTVProcessor, load_tokenizer
from tinygptv.training.stages import TRAINABLE_PARTS

SHARD_BYTES = 1 << 30
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Progress = Callable[[str], None]


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as transformers' sharded safetensors, holding one shard in memory at a time.

    Args:
        folder: where to.
        tensors: (name, value), read as they are written.
        shard_bytes: most bytes of a shard.
    """
    waiting: dict[str, Tensor] = {}
    files: list[dict[str, int]] = []
    size = total = 0

    def flush() -> None:
        nonlocal size
        if waiting:
            save_file(waiting, folder / f"shard-{len(files) + 1}.safetensors", metadata={"format": "pt"})
            files.append(dict.fromkeys(waiting, len(files) + 1))
            waiting.clear()
            size = 0

    for name, tensor in tensors:
        if size + tensor.nbytes > shard_bytes:
            flush()
        waiting[name] = tensor.contiguous().clone()  # a mapped file must not stay open through its tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    names = {i: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)}
    for i, name in names.items():
        (folder / f"shard-{i}.safetensors").rename(folder / name)
    weight_map = {name: names[i] for file in files for name, i in file.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def convert_release(
    release: Release,
    output: Path,
    tokenizer: str | Path,
    dtype: torch.dtype,
    template: str = "human",
    facts: dict[str, object] | None = None,
) -> Path:
    """Write matched release files as a checkpoint folder.

    Args:
        release: from ``match_release``.
        output: the folder.
        tokenizer: folder with Phi-2's tokenizer.
        dtype: of the frozen matrices.
        template: key of ``prompts.TEMPLATES`` that the weights were trained with.
        facts: more entries for ``stage.json``.
    """
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

    config = release.config
    config.template = template
    config.architectures = ["TinyGPTVForConditionalGeneration"]
    config.dtype = dtype

    def fill(staging: Path) -> None:
        write_shards(staging, _all_tensors(release, dtype))
        config.save_pretrained(staging)
        processor = TinyGPTVProcessor.from_config(config, load_tokenizer(tokenizer))
        processor.save_pretrained(staging)
        stage = {"title": "converted from release files", **(facts or {})}
        (staging / STAGE_FILE).write_text(json.dumps(stage, indent=1))
        with torch.device("meta"):
            model = TinyGPTVForConditionalGeneration(config)
        processor.set_end_symbol(model.generation_config)
        model.generation_config.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(model, stage))

    return write_folder(output, fill)


def _all_tensors(release: Release, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield from release.tensors(dtype)
    yield from build_fresh(release, dtype)


def write_release_stage(checkpoint: Path, output: Path) -> Path:
    """Write what a stage trains as the release's stage ``.pth``: ``{"model": {...}}`` in its names and row orders."""
    config = TinyGPTVConfig.from_pretrained(checkpoint)
    heads, lora = config.text_config.num_attention_heads, bool(config.lora_rank)
    marks = [mark for part in ("projector", "lora", "language_norms") for mark in TRAINABLE_PARTS[part]]
    state: dict[str, Tensor] = {}
    for name, lazy in open_weights(checkpoint).items():
        found = release_key(plain_key(name), lora) if any(mark in name for mark in marks) else None
        if found:
            key, per_head = found
            tensor = lazy.load().float()
            state[key] = (interleave_heads(tensor, heads) if per_head else tensor).clone()
    # The release's filter keeps buffers, and readers of its files may look for this one.
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    temporary = output.with_name(f".{output.name}.tmp")
    torch.save({"model": state}, temporary)
    temporary.rename(output)
    return output


def write_split_phi(checkpoint: Path, output: Path) -> list[str]:
    """Write the language model as plain Phi-2 in the split layout of current transformers.

    Returns:
        Names of the norms that TinyGPT-V adds, for which plain Phi-2 has no place.
    """
    config = TinyGPTVConfig.from_pretrained(checkpoint)
    left_out: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, lazy in open_weights(checkpoint).items():
            if name.startswith(("language_model.", "lm_head.")):
                theirs = split_phi_tensors(plain_key(name), lazy.load())
                yield from theirs.items()
                if not theirs:
                    left_out.append(name)

    def fill(staging: Path) -> None:
        write_shards(staging, tensors())
        text = config.text_config.to_dict()
        own = ("qk_layernorm", "attention_rmsnorm", "input_layernorm", "attention_rmsnorm_eps")
        plain = {key: value for key, value in text.items() if key not in own}
        plain |= {"model_type": "phi", "architectures": ["PhiForCausalLM"], "hidden_act": "gelu_new"}
        (staging / "config.json").write_text(json.dumps(plain, indent=1, default=str))

    write_folder(output, fill)
    return left_out


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; a bad file ends it with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tinygptv.convert", description="Convert weights, strictly.")
    commands = parser.add_subparsers(dest="command", required=True)
    release = commands.add_parser("release", help="files in the original layouts -> checkpoint folder")
    for role in ("vision", "qformer", "language", "projection", "checkpoint"):
        release.add_argument(f"--{role}")
    release.add_argument("--tokenizer", help="tokenizer folder; default: the language folder")
    release.add_argument("--image-size", type=int)
    release.add_argument("--vision-heads", type=int)
    release.add_argument("--qformer-heads", type=int)
    release.add_argument("--lora-alpha", type=int, default=16)
    release.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    release.add_argument("--template", default="human", help="prompt template; stage-4 files of the release: inst")
    release.add_argument("--output", required=True, type=Path)
    for name, text in (
        ("to-release", "checkpoint folder -> the release's stage .pth"),
        ("to-phi2", "checkpoint folder -> plain Phi-2, split layout"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("source", type=Path)
        command.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args(argv)
    try:
        _run(arguments)
    except (WeightFileError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command != "release":
        verify_folder(arguments.source, hashes=False)
        if arguments.command == "to-release":
            write_release_stage(arguments.source, arguments.output)
        else:
            left_out = write_split_phi(arguments.source, arguments.output)
            print(f"left out {len(left_out)} tensors of added norms, for which plain Phi-2 has no place")
        return
    release = match_release(
        arguments.vision,
        arguments.qformer,
        arguments.language,
        arguments.projection,
        arguments.checkpoint,
        arguments.image_size,
        arguments.vision_heads,
        arguments.qformer_heads,
        arguments.lora_alpha,
    )
    print(release.report)
    tokenizer = arguments.tokenizer or arguments.language
    if tokenizer is None:
        raise ValueError("give --tokenizer, the folder of Phi-2's tokenizer.")
    convert_release(release, arguments.output, tokenizer, _DTYPES[arguments.dtype], arguments.template)


if __name__ == "__main__":
    raise SystemExit(main())
