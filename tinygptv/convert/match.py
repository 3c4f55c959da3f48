"""Matching foreign weight files against our names, before anything is read: who supplies what, and what is missing.

Each tensor of a file is loaded, ignored for a stated reason, or an error. Each tensor of the model is
either supplied, or one of those that a fresh start is allowed to lack (projector, added norms: only where no stage
checkpoint was given), or an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tinygptv.checkpoint.folders import QUANTIZATION_FILE
from tinygptv.checkpoint.weight_files import LazyTensor, WeightFileError, open_weights
from tinygptv.config import TinyGPTVConfig
from tinygptv.convert.layouts import (
    SPLIT_PARTS,
    Ignored,
    Target,
    language_layout,
    language_target,
    plain_key,
    projector_target,
    qformer_target,
    separate_heads,
    vision_target,
)
from tinygptv.convert.sizes import WHO_HOLDS, Sizes, language_settings
from tinygptv.model.meta import tensor_shapes
from tinygptv.model.tinygptv import FLOAT32_NAMES
from tinygptv.model.vision_encoder import interpolate_position_embedding

RELEASE_VISION_DEPTH = 39
"""Blocks of EVA ViT-g that the release builds; the public file may hold a fortieth."""
MINIGPT4_13B_ROWS = 5120


@dataclass
class LoadReport:
    """Where each tensor of a loaded model came from.

    Attributes:
        counts: (part, file) -> number of tensors.
        fresh: tensors that no file supplied and that are newly initialised.
        ignored: (key, file, reason) of tensors that were left out.
        layouts: language file -> the layout it was recognised as.
    """

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    ignored: list[tuple[str, str, str]] = field(default_factory=list)
    layouts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{part:18} {count:5} tensors from {file}" for (part, file), count in sorted(self.counts.items())]
        lines += [f"{'':18} {layout}: {file}" for file, layout in self.layouts.items()]
        groups: dict[str, int] = {}
        for name in self.fresh:
            group = re.sub(r"\.\d+\.", ".*.", name)
            groups[group] = groups.get(group, 0) + 1
        lines += [f"{'fresh':18} {count:5} x {group}" for group, count in groups.items()]
        reasons: dict[tuple[str, str], int] = {}
        for _, file, reason in self.ignored:
            reasons[reason, file] = reasons.get((reason, file), 0) + 1
        lines += [f"{'ignored':18} {count:5} tensors of {file}: {reason}" for (reason, file), count in reasons.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Piece:
    """A tensor of another layout and the parameter it fills."""

    tensor: LazyTensor
    target: Target


@dataclass
class Release:
    """Foreign files, matched against our names but not read yet.

    Attributes:
        config: sizes read from the tensors.
        report: where everything comes from.
    """

    config: TinyGPTVConfig
    report: LoadReport
    pieces: dict[str, list[Piece]]

    def tensors(self, dtype: torch.dtype | None = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors one by one: (our state-dict name, value); what stages train is float32.

        Args:
            dtype: of the others; None keeps that of the files (``in_sixteen_bits``).

        Raises:
            WeightFileError: a tensor holds NaN or infinite numbers, or numbers beyond the range of ``dtype``.
        """
        decorate = decorator(self.config)
        heads = self.config.text_config.num_attention_heads
        grid = self.config.vision_config.image_size // self.config.vision_config.patch_size
        for name, pieces in self.pieces.items():
            parts = []
            for piece in sorted(pieces, key=lambda p: p.target.piece or 0):
                value = piece.tensor.load()
                parts.append(separate_heads(value, heads) if piece.target.per_head else value)
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            if name.endswith("vit.pos_embed"):
                value = interpolate_position_embedding(value, grid)
            wanted = torch.float32 if FLOAT32_NAMES.match(name) else dtype
            converted = value.to(wanted) if wanted else in_sixteen_bits(value)
            if not converted.isfinite().all():
                raise WeightFileError(_not_finite(pieces, value, converted.dtype))
            yield decorate(name), converted


def in_sixteen_bits(value: Tensor) -> Tensor:
    """A tensor as its file holds it, where that has 16 bits; a wider one in float16, as the release computes.

    float16 rounds to an eighth of bfloat16's step; bfloat16 is for numbers beyond float16's range.
    """
    if value.dtype in (torch.float16, torch.bfloat16):
        return value
    halved = value.half()
    return halved if halved.isfinite().all() else value.bfloat16()


def _not_finite(pieces: Sequence[Piece], value: Tensor, dtype: torch.dtype) -> str:
    keys, file = " and ".join(piece.tensor.key for piece in pieces), pieces[0].tensor.file
    if value.isfinite().all():
        return f"{keys} of {file} holds numbers beyond the range of {dtype}: choose another dtype."
    return f"{keys} of {file} holds NaN or infinite numbers: the file is damaged, or its training had diverged."


def match_release(
    vision: str | Path | None,
    qformer: str | Path | None,
    language: str | Path | None,
    projection: str | Path | None,
    checkpoint: str | Path | None,
    image_size: int | None = None,
    vision_heads: int | None = None,
    qformer_heads: int | None = None,
    lora_alpha: int = 16,
) -> Release:
    """Match the tensors of all files against our names, read the sizes, and check both; nothing is read yet.

    Args and Raises: as ``load_release``.
    """
    report = LoadReport()
    pieces: dict[str, list[Piece]] = {}
    given = {
        "vision": vision,
        "qformer": qformer,
        "language": language,
        "projection": projection,
        "checkpoint": checkpoint,
    }
    for role, path in given.items():
        if path is None:
            continue
        for name, found in _match_file(role, Path(path), report).items():
            pieces[name] = found  # later files win, as in the release
    sizes = Sizes({name: whole_shape(found) for name, found in pieces.items()}, language_settings(language))
    config = sizes.config(image_size, vision_heads, qformer_heads, lora_alpha)
    _check(config, pieces, report, {role: str(path) for role, path in given.items() if path is not None})
    return Release(config, report, pieces)


def _refuse_own_folder(role: str, path: Path) -> None:
    """A folder of this project is no foreign weights, though some of its names look like them."""
    if (path / QUANTIZATION_FILE).is_file():
        raise WeightFileError(f"{path}, given as {role}=, is a quantized artifact: give the original weights.")
    settings = language_settings(path) if path.is_dir() else {}
    if settings.get("model_type") == TinyGPTVConfig.model_type:
        raise WeightFileError(
            f"{path}, given as {role}=, is a checkpoint of this project, which needs no conversion: give the original "
            f"file, {_EXPECTED[role]}."
        )


def _match_file(role: str, path: Path, report: LoadReport) -> dict[str, list[Piece]]:
    _refuse_own_folder(role, path)
    tensors = open_weights(path)
    keys = [plain_key(key) for key in tensors]
    mappers = _mappers(role, keys)
    pieces: dict[str, list[Piece]] = {}
    unknown: list[str] = []
    for tensor, key in zip(tensors.values(), keys, strict=True):
        target = next((found for mapper in mappers if (found := mapper(key)) is not None), None)
        if isinstance(target, Target):
            pieces.setdefault(target.name, []).append(Piece(tensor, target))
        elif isinstance(target, Ignored):
            report.ignored.append((tensor.key, str(tensor.file), target.reason))
        else:
            unknown.append(tensor.key)
    if not pieces:
        raise WeightFileError(
            f"{path} was given as {role}= but holds none of its tensors (it has {len(tensors)}, "
            f"e.g. {next(iter(tensors))!r}); expected {_EXPECTED[role]}."
        )
    if unknown:
        raise WeightFileError(
            f"{path}, given as {role}=, holds {len(unknown)} tensors that belong to no part of this model, "
            f"e.g. {unknown[0]!r}: it seems to be another model's file; expected {_EXPECTED[role]}."
        )
    if any(name.startswith("language_model.") and ".mlp." in name for name in pieces):
        report.layouts[str(path)] = language_layout(list(tensors))
    _check_thirds(pieces, path)
    return pieces


_EXPECTED = {
    "vision": "EVA ViT-g as in eva_vit_g.pth (cls_token, pos_embed, patch_embed.proj, blocks.*)",
    "qformer": "BLIP-2's Q-Former (query_tokens, ln_vision, Qformer.bert.*)",
    "language": "Phi-2 in one of its four layouts (model.layers.*, transformer.h.* or layers.*)",
    "projection": "MiniGPT-4's projection (llama_proj.weight, llama_proj.bias)",
    "checkpoint": "a TinyGPT-V stage file (llama_proj, llama_proj2, llama_model.*)",
}

Mapper = Callable[[str], Target | Ignored | None]


def _mappers(role: str, keys: list[str]) -> list[Mapper]:
    blocks = [int(m[1]) for key in keys if (m := re.match(r"^(?:visual_encoder\.)?blocks\.(\d+)\.", key))]
    depth = max(blocks, default=-1) + 1
    depth = RELEASE_VISION_DEPTH if depth == RELEASE_VISION_DEPTH + 1 else depth
    sequential = [int(m[1]) for key in keys if (m := re.match(r"^(?:llama_model\.)?layers\.(\d+)\.", key))]
    last = max(sequential, default=None) if any(key.endswith("layers.0.wte.weight") for key in keys) else None

    def vision(key: str) -> Target | Ignored | None:
        return vision_target(key, depth)

    def language(key: str) -> Target | Ignored | None:
        return language_target(key, last)

    def other_part(key: str) -> Ignored | None:
        """MiniGPT-4's own file holds more than the projection; only that is wanted of it."""
        found = vision(key) or qformer_target(key) or language(key)
        return Ignored("not the projection") if found is not None else None

    mappers: dict[str, list[Mapper]] = {
        "vision": [vision, qformer_target] if any(key.startswith("visual_encoder.") for key in keys) else [vision],
        "qformer": [qformer_target],
        "language": [language],
        "projection": [projector_target, other_part],
        "checkpoint": [projector_target, qformer_target, vision, language],
    }
    return mappers[role]


def _check_thirds(pieces: dict[str, list[Piece]], path: Path) -> None:
    for name, found in pieces.items():
        thirds = {piece.target.piece for piece in found} - {None}
        lacking = [part for i, part in enumerate(SPLIT_PARTS) if i not in thirds]
        if thirds and lacking:
            raise WeightFileError(
                f"{path} lacks {', '.join(lacking)} of {name}: split q, k and v projections come in threes."
            )
        first: dict[int | None, Piece] = {}
        for piece in found:
            if piece.target.piece in first or (first and None in {*first, piece.target.piece}):
                other = first.get(piece.target.piece, found[0])
                raise WeightFileError(
                    f"{path} holds {other.tensor.key} and {piece.tensor.key}, which are the same tensor."
                )
            first[piece.target.piece] = piece


def _part(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def whole_shape(pieces: list[Piece]) -> tuple[int, ...]:
    """Shape of what the pieces make together: thirds of a fused projection are stacked."""
    first = pieces[0].tensor.shape
    return (sum(piece.tensor.shape[0] for piece in pieces), *first[1:]) if len(pieces) > 1 else first


def decorator(config: TinyGPTVConfig) -> Callable[[str], str]:
    """Plain names to names in a model with LoRA wrapping (identity without)."""
    if not config.lora_rank:
        return lambda name: name
    wrapped = re.compile(r"\.(qkv_proj|dense)\.(weight|bias)$")

    def decorate(name: str) -> str:
        if not name.startswith("language_model."):
            return name
        name = re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name)
        return wrapped.sub(r".\1.base_layer.\2", name)

    return decorate


_FRESH_ALWAYS = re.compile(r"(q_layernorm|k_layernorm)\.bias$")
_FRESH_AT_START = re.compile(r"(^projector\.|(q_layernorm|k_layernorm|attention_rmsnorm)\.weight$)")


def _check(config: TinyGPTVConfig, pieces: dict[str, list[Piece]], report: LoadReport, given: dict[str, str]) -> None:
    """Compare what the files supply with what the model needs; fill in the report."""
    needed = tensor_shapes(config)
    decorate = decorator(config)
    supplied = {decorate(name): name for name in pieces}
    for decorated, name in supplied.items():
        file, key = pieces[name][0].tensor.file, pieces[name][0].tensor.key
        if decorated not in needed:
            raise WeightFileError(
                f"{key} of {file} does not belong to a model of {config.text_config.num_hidden_layers} language layers."
            )
        found, wanted = whole_shape(pieces[name]), needed[decorated]
        if name == "projector.linear_1.weight" and found[0] == MINIGPT4_13B_ROWS:
            raise WeightFileError(
                f"{key} of {file} is {list(found)}: that is the projection of MiniGPT-4 13B; the model needs the 7B "
                f"one, [4096, {found[1]}]."
            )
        if found != wanted and not name.endswith("vit.pos_embed"):
            raise WeightFileError(f"{key} of {file} is {list(found)} but the model needs {list(wanted)} for {name}.")
        entry = (_part(name), str(file))
        report.counts[entry] = report.counts.get(entry, 0) + 1
    for name in sorted(set(needed) - set(supplied)):
        plain = name.replace(".base_layer.", ".").replace(".default.", ".")
        allowed = _FRESH_ALWAYS.search(plain) or ("checkpoint" not in given and _FRESH_AT_START.search(plain))
        if not allowed:
            source = given.get("checkpoint") if ".lora_" in plain or _FRESH_AT_START.search(plain) else None
            where = f"{source} lacks it" if source else f"give the file that holds it ({WHO_HOLDS[_part(plain)]})"
            raise WeightFileError(f"no file supplies {plain} {list(needed[name])}: {where}.")
        report.fresh.append(plain)
