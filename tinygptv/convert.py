"""Foreign weights -> our model, strictly; and back.

Every file is listed before anything is read; each of its tensors is either given a place, or ignored for a stated reason,
or an error. Each tensor of the model is either supplied, or one of those that a fresh start is allowed to lack (projector,
added norms, LoRA: only where no stage checkpoint was given), or an error that names it.

    python -m tinygptv.convert release --vision eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth \\
        --language phi-2/ --checkpoint TinyGPT-V_for_Stage4.pth --image-size 448 --output checkpoint/
    python -m tinygptv.convert to-release checkpoint/ --output TinyGPT-V_for_Stage4.pth
    python -m tinygptv.convert to-phi2 checkpoint/ --output phi-2-split/
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygptv.config import TinyGPTVConfig
from tinygptv.model import TinyGPTVForConditionalGeneration
from tinygptv.release_layouts import (
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
from tinygptv.vision import interpolate_position_embedding
from tinygptv.weight_files import LazyTensor, WeightFileError, open_weights

RELEASE_VISION_DEPTH = 39
"""Blocks of EVA ViT-g that the release builds; the public file may hold a fortieth."""
RELEASE_VISION_HEAD = 88
RELEASE_QFORMER_HEAD = 64
PHI2_HEAD = 80
MINIGPT4_13B_ROWS = 5120
_FP32 = re.compile(r"^(projector\.|language_model\..*(_layernorm|attention_rmsnorm|lora_[AB])\.)")
"""What a stage trains: float32 whatever the dtype of the frozen matrices."""


@dataclass
class LoadReport:
    """Where each tensor of a loaded model came from.

    Attributes:
        counts: (part, file) -> number of tensors.
        fresh: tensors that no file supplied and that start anew.
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
class _Piece:
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
    _pieces: dict[str, list[_Piece]]

    def tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors one by one: (our state-dict name, value); what stages train stays float32."""
        decorate = _decorator(self.config)
        heads = self.config.text_config.num_attention_heads
        grid = self.config.vision_config.image_size // self.config.vision_config.patch_size
        for name, pieces in self._pieces.items():
            parts = []
            for piece in sorted(pieces, key=lambda p: p.target.piece or 0):
                value = piece.tensor.load()
                parts.append(separate_heads(value, heads) if piece.target.per_head else value)
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            if name.endswith("vit.pos_embed"):
                value = interpolate_position_embedding(value, grid)
            yield decorate(name), value.to(torch.float32 if _FP32.match(name) else dtype)


def load_release(
    vision: str | Path | None = None,
    qformer: str | Path | None = None,
    language: str | Path | None = None,
    projection: str | Path | None = None,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    vision_heads: int | None = None,
    qformer_heads: int | None = None,
    lora_alpha: int = 16,
    dtype: torch.dtype = torch.float32,
) -> TinyGPTVForConditionalGeneration:
    """Build a model from files in the original layouts; sizes are read from the tensors.

    Args:
        vision: ``eva_vit_g.pth``.
        qformer: BLIP-2's file (Q-Former, query tokens, ``ln_vision``).
        language: Phi-2, a folder or file in any of its four layouts.
        projection: MiniGPT-4's projection (first linear layer), for a start at stage 1.
        checkpoint: a stage file of the release, or a file of the whole model; its tensors win over the others'.
        image_size: side of the input in pixels; None keeps the position embedding's. Another one resamples it.
        vision_heads: attention heads of the ViT; None assumes the release's head width, 88.
        qformer_heads: attention heads of the Q-Former; None assumes the release's head width, 64.
        lora_alpha: LoRA scale numerator, which no file records.
        dtype: dtype of the frozen matrices; projector, LoRA and the language model's norms stay float32.

    Returns:
        The model in evaluation mode, with the ``LoadReport`` as ``model.load_report``.

    Raises:
        WeightFileError: a file is unusable, or a tensor is missing, misshapen, or belongs to another model.
    """
    release = match_release(
        vision, qformer, language, projection, checkpoint, image_size, vision_heads, qformer_heads, lora_alpha
    )
    with torch.device("meta"):
        model = TinyGPTVForConditionalGeneration(release.config)
    model = build_from_tensors(model, chain(release.tensors(dtype), build_fresh(release, dtype)))
    model.load_report = release.report
    return model.eval()


def build_from_tensors(
    model: TinyGPTVForConditionalGeneration, tensors: Iterator[tuple[str, Tensor]]
) -> TinyGPTVForConditionalGeneration:
    """Fill a model that was built on the meta device, and recompute its buffers.

    Args:
        model: on the meta device.
        tensors: (state-dict name, value) of every parameter.
    """
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    for module in model.modules():
        _rebuild_buffers(module)
    return model


def build_fresh(release: Release, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Initialise what no file supplied and a fresh start may lack: (state-dict name, value)."""
    decorate = _decorator(release.config)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in TinyGPTVForConditionalGeneration(release.config).state_dict().items()}
    for plain in release.report.fresh:
        name = decorate(plain)
        value = _fresh(name, shapes[name], release.config)
        yield name, value.to(torch.float32 if _FP32.match(name) else dtype)


def _fresh(name: str, shape: tuple[int, ...], config: TinyGPTVConfig) -> Tensor:
    if name.endswith("lora_B.default.weight") or name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith("lora_A.default.weight"):
        return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.nn.init.normal_(torch.empty(shape), std=config.initializer_range)


def _rebuild_buffers(module: torch.nn.Module) -> None:
    """Buffers that no file holds (rotary frequencies, EVA's zero key bias) are on meta after a meta build."""
    if type(module).__name__ == "PhiRotaryEmbedding":
        inv_freq, _ = module.compute_default_rope_parameters(module.config)
        module.inv_freq = inv_freq
        module.original_inv_freq = inv_freq.clone()
        return
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.device.type == "meta":
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


# ---------------------------------------------------------------------- matching


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
    pieces: dict[str, list[_Piece]] = {}
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
    sizes = _Sizes(pieces, _language_settings(language))
    config = sizes.config(image_size, vision_heads, qformer_heads, lora_alpha)
    _check(config, pieces, report, {role: str(path) for role, path in given.items() if path is not None})
    return Release(config, report, pieces)


def _match_file(role: str, path: Path, report: LoadReport) -> dict[str, list[_Piece]]:
    tensors = open_weights(path)
    keys = [plain_key(key) for key in tensors]
    mappers = _mappers(role, keys)
    pieces: dict[str, list[_Piece]] = {}
    unknown: list[str] = []
    for tensor, key in zip(tensors.values(), keys, strict=True):
        target = next((found for mapper in mappers if (found := mapper(key)) is not None), None)
        if isinstance(target, Target):
            pieces.setdefault(target.name, []).append(_Piece(tensor, target))
        elif isinstance(target, Ignored):
            report.ignored.append((tensor.key, str(tensor.file), target.reason))
        else:
            unknown.append(tensor.key)
    if not pieces:
        raise WeightFileError(
            f"{path} was given as {role}= but holds none of its tensors (it has {len(tensors)}, e.g. {next(iter(tensors))!r}); "
            f"expected {_EXPECTED[role]}."
        )
    if unknown:
        raise WeightFileError(
            f"{path}, given as {role}=, holds {len(unknown)} tensors that belong to no part of this model, e.g. {unknown[0]!r}: "
            f"it seems to be another model's file; expected {_EXPECTED[role]}."
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

    return {
        "vision": [vision, qformer_target] if any(key.startswith("visual_encoder.") for key in keys) else [vision],
        "qformer": [qformer_target],
        "language": [language],
        "projection": [projector_target, other_part],
        "checkpoint": [projector_target, qformer_target, vision, language],
    }[role]


def _check_thirds(pieces: dict[str, list[_Piece]], path: Path) -> None:
    for name, found in pieces.items():
        thirds = sorted(piece.target.piece for piece in found if piece.target.piece is not None)
        if thirds and thirds != [0, 1, 2]:
            lacking = [SPLIT_PARTS[i] for i in range(3) if i not in thirds]
            raise WeightFileError(
                f"{path} lacks {', '.join(lacking)} of {name}: split q, k and v projections come in threes."
            )
        if not thirds and len(found) > 1:
            raise WeightFileError(
                f"{path} holds {found[0].tensor.key} and {found[1].tensor.key}, which are the same tensor."
            )


def _language_settings(language: str | Path | None) -> dict[str, Any]:
    """config.json beside the language weights; empty where there is none."""
    if language is None:
        return {}
    folder = Path(language) if Path(language).is_dir() else Path(language).parent
    file = folder / "config.json"
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise WeightFileError(f"{file} is no valid JSON: {error}.") from error


class _Sizes:
    """Reads a configuration off tensor shapes."""

    def __init__(self, pieces: dict[str, list[_Piece]], language_settings: dict[str, Any]) -> None:
        self.pieces = pieces
        self.settings = language_settings

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor, thirds added up."""
        if name not in self.pieces:
            part = _part(name)
            raise WeightFileError(f"no file supplies {name}: give the file that holds the {part} ({_WHO_HOLDS[part]}).")
        shapes = [piece.tensor.shape for piece in self.pieces[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def depth(self, prefix: str) -> int:
        """1 + the largest layer number after a prefix."""
        found = [int(name[len(prefix) :].split(".")[0]) for name in self.pieces if name.startswith(prefix)]
        return max(found, default=-1) + 1

    def config(
        self, image_size: int | None, vision_heads: int | None, qformer_heads: int | None, lora_alpha: int
    ) -> TinyGPTVConfig:
        text, lora_rank = self.text()
        query_shape = self.shape("qformer.query_tokens")
        projector = "projector.linear_1.weight"
        defaults = TinyGPTVConfig.phi2()
        return TinyGPTVConfig(
            vision_config=self.vision(image_size, vision_heads),
            qformer_config=self.qformer(qformer_heads),
            text_config=text,
            num_query_tokens=query_shape[1],
            projector_hidden_size=self.shape(projector)[0]
            if projector in self.pieces
            else defaults.projector_hidden_size,
            # The row after the last tokenizer entry; a table without spare rows gets an id outside of it.
            image_token_id=min(defaults.image_token_id, text["vocab_size"]),
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=defaults.lora_dropout,
        )

    def vision(self, image_size: int | None, heads: int | None) -> dict[str, Any]:
        width, _, patch, _ = self.shape("vision_encoder.vit.patch_embed.proj.weight")
        positions = self.shape("vision_encoder.vit.pos_embed")[1] - 1
        side = round(positions**0.5)
        if side * side != positions:
            raise WeightFileError(f"pos_embed has {positions} patch rows, which is no square grid.")
        return {
            "image_size": image_size or side * patch,
            "patch_size": patch,
            "hidden_size": width,
            "num_hidden_layers": self.depth("vision_encoder.vit.blocks."),
            "num_attention_heads": heads or _heads(width, RELEASE_VISION_HEAD, "vision_heads"),
            "intermediate_size": self.shape("vision_encoder.vit.blocks.0.mlp.fc1.weight")[0],
        }

    def qformer(self, heads: int | None) -> dict[str, Any]:
        prefix = "qformer.encoder.encoder.layer."
        width = self.shape("qformer.query_tokens")[2]
        crossing = sorted(
            {int(n[len(prefix) :].split(".")[0]) for n in self.pieces if n.startswith(prefix) and "crossattention" in n}
        )
        return {
            "hidden_size": width,
            "num_hidden_layers": self.depth(prefix),
            "num_attention_heads": heads or _heads(width, RELEASE_QFORMER_HEAD, "qformer_heads"),
            "intermediate_size": self.shape(f"{prefix}0.intermediate_query.dense.weight")[0],
            "encoder_hidden_size": self.shape(f"{prefix}0.crossattention.attention.key.weight")[1],
            "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else max(self.depth(prefix), 1),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }

    def text(self) -> tuple[dict[str, Any], int]:
        vocab, width = self.shape("language_model.embed_tokens.weight")
        layer = "language_model.layers.0"
        norm, lora = f"{layer}.self_attn.q_layernorm.weight", f"{layer}.self_attn.qkv_proj.lora_A.weight"
        heads = self.settings.get("num_attention_heads") or self.settings.get("n_head")
        if norm in self.pieces:
            head = self.shape(norm)[0]
            if heads and width // head != heads:
                raise WeightFileError(
                    f"config.json says {heads} heads but q_layernorm has width {head} at hidden size {width}."
                )
            heads = width // head
        heads = heads or _heads(width, PHI2_HEAD, "num_attention_heads in the language folder's config.json")
        rotary = self.settings.get("partial_rotary_factor") or (self.settings.get("rope_parameters") or {}).get(
            "partial_rotary_factor"
        )
        if rotary is None and self.settings.get("rotary_dim"):
            rotary = self.settings["rotary_dim"] / (width // heads)
        end = self.settings.get("eos_token_id")
        end = end if isinstance(end, int) else min(50256, vocab - 1)
        settings = {
            "vocab_size": vocab,
            "hidden_size": width,
            "num_hidden_layers": self.depth("language_model.layers."),
            "num_attention_heads": heads,
            "intermediate_size": self.shape(f"{layer}.mlp.fc1.weight")[0],
            "partial_rotary_factor": rotary or 0.4,
            "resid_pdrop": self.settings.get("resid_pdrop", 0.1),
            "max_position_embeddings": self.settings.get("max_position_embeddings")
            or self.settings.get("n_positions")
            or 2048,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
        }
        return settings, self.shape(lora)[0] if lora in self.pieces else 0


def _heads(width: int, head_width: int, setting: str) -> int:
    if width % head_width:
        raise WeightFileError(
            f"a width of {width} does not divide into heads of {head_width}: say how many there are with {setting}."
        )
    return width // head_width


_WHO_HOLDS = {
    "vision_encoder": "vision=eva_vit_g.pth; its ln_vision is in BLIP-2's file, qformer=",
    "qformer": "qformer=blip2_pretrained_flant5xxl.pth",
    "projector": "checkpoint=, or projection= for its first layer",
    "language_model": "language=, the Phi-2 folder",
    "lm_head": "language=, the Phi-2 folder",
}


def _part(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def _decorator(config: TinyGPTVConfig) -> Callable[[str], str]:
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


def _check(config: TinyGPTVConfig, pieces: dict[str, list[_Piece]], report: LoadReport, given: dict[str, str]) -> None:
    """Compare what the files supply with what the model needs; fill in the report."""
    with torch.device("meta"):
        needed = {n: tuple(t.shape) for n, t in TinyGPTVForConditionalGeneration(config).state_dict().items()}
    decorate = _decorator(config)
    supplied = {decorate(name): name for name in pieces}
    sizes = _Sizes(pieces, {})
    for decorated, name in supplied.items():
        file, key = pieces[name][0].tensor.file, pieces[name][0].tensor.key
        if decorated not in needed:
            raise WeightFileError(
                f"{key} of {file} has no place in a model of {config.text_config.num_hidden_layers} language layers."
            )
        found, wanted = sizes.shape(name), needed[decorated]
        if name == "projector.linear_1.weight" and found[0] == MINIGPT4_13B_ROWS:
            raise WeightFileError(
                f"{key} of {file} is {list(found)}: that is the projection of MiniGPT-4 13B; the model needs the 7B one, "
                f"[4096, {found[1]}]."
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
            where = f"{source} lacks it" if source else f"give the file that holds it ({_WHO_HOLDS[_part(plain)]})"
            raise WeightFileError(f"no file supplies {plain} {list(needed[name])}: {where}.")
        report.fresh.append(plain)


if __name__ == "__main__":
    from tinygptv.convert_cli import main

    raise SystemExit(main())
