"""Key maps between foreign layouts and ours, in both directions. Names and row orders only; no files.

Our *plain* name of a tensor is its name in a model without LoRA wrapping, e.g.
``language_model.layers.0.self_attn.qkv_proj.weight`` and, for adapters, ``...qkv_proj.lora_A.weight``.

Row orders of the fused q/k/v projection (H heads of width W):

* ours and layouts 1 and 2 (``Wqkv``)      [3, H, W]  all q, all k, all v
* layout 3 (``query_key_value``), release  [H, 3, W]  per head q, k, v
* layout 4 (``q_proj``, ``k_proj``, ...)   three [H, W] matrices

Source: upstream release and its pinned transformers (section B of its formats).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT_PARTS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Target:
    """Where a foreign tensor goes.

    Attributes:
        name: our plain name.
        piece: None for a whole tensor; 0, 1, 2 for the q, k, v third of a fused one.
        per_head: rows come in [H, 3, W] order and must become [3, H, W].
    """

    name: str
    piece: int | None = None
    per_head: bool = False


@dataclass(frozen=True)
class Ignored:
    """A tensor of another layout that the model does not use, and why."""

    reason: str


def interleave_heads(rows: Tensor, num_heads: int) -> Tensor:
    """[3, H, W] row order to [H, 3, W]; works on weights, biases and LoRA B."""
    width = rows.shape[0] // (3 * num_heads)
    return rows.reshape(3, num_heads, width, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape).contiguous()


def separate_heads(rows: Tensor, num_heads: int) -> Tensor:
    """[H, 3, W] row order to [3, H, W]; the inverse of ``interleave_heads``."""
    width = rows.shape[0] // (3 * num_heads)
    return rows.reshape(num_heads, 3, width, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape).contiguous()


# ---------------------------------------------------------------------- normalising wrapped names

_WRAPPERS = re.compile(r"^(?:(?:model\.)?module\.|_orig_mod\.)+")


def plain_key(key: str) -> str:
    """Undo what wrappers add to names: those of DDP, ``torch.compile`` and peft, in any order."""
    key = _WRAPPERS.sub("", key)
    key = (
        key.replace(".base_layer.", ".").replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    )
    return re.sub(r"^(llama_model\.)?base_model\.model\.", r"\1", key)


# ---------------------------------------------------------------------- vision and Q-Former

_VISION = re.compile(
    r"^(cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|blocks\.\d+\."
    r"(norm[12]\.(weight|bias)|attn\.(q_bias|v_bias|qkv\.weight|proj\.(weight|bias))|mlp\.fc[12]\.(weight|bias)))$"
)
_QFORMER_LAYER = re.compile(r"^(Qformer\.)?bert\.encoder\.layer\.(\d+)\.(.+)$")
_QFORMER_KEPT = re.compile(
    r"^((attention|crossattention)\.(self\.(query|key|value)|output\.(dense|LayerNorm))"
    r"|intermediate_query\.dense|output_query\.(dense|LayerNorm))\.(weight|bias)$"
)


def vision_target(key: str, depth: int) -> Target | Ignored | None:
    """Map a key of ``eva_vit_g.pth`` (or ``visual_encoder.*``); None means it is no vision key.

    Args:
        key: plain foreign key.
        depth: blocks that the model has.
    """
    name = key.removeprefix("visual_encoder.")
    block = re.match(r"^blocks\.(\d+)\.", name)
    if block and int(block[1]) >= depth:
        return Ignored(f"the model ends after block {depth - 1}")
    if _VISION.match(name):
        return Target(f"vision_encoder.vit.{name}")
    if block or name.split(".")[0] in ("norm", "fc_norm", "head", "rel_pos_bias", "mask_token", "lm_head"):
        return Ignored("the encoder has no final norm, head or relative position bias")
    return Ignored("no tensor of the encoder") if key.startswith("visual_encoder.") else None


def qformer_target(key: str) -> Target | Ignored | None:
    """Map a key of BLIP-2's Q-Former file; None means it is none of its keys."""
    if key == "query_tokens":
        return Target("qformer.query_tokens")
    if key.startswith("ln_vision."):
        return Target(f"vision_encoder.{key}")
    name = key.removeprefix("Qformer.")
    if name.startswith("bert.embeddings.LayerNorm."):
        return Target(f"qformer.encoder.layernorm.{name.rsplit('.', 1)[1]}")
    if name.startswith(("bert.embeddings.", "cls.")):
        return Ignored("text branch of the Q-Former, which the model does not build")
    match = _QFORMER_LAYER.match(key)
    if match:
        rest = match[3]
        if _QFORMER_KEPT.match(rest):
            return Target(f"qformer.encoder.encoder.layer.{match[2]}.{rest.replace('.self.', '.attention.')}")
        return Ignored("text branch of the Q-Former, which the model does not build")
    if re.match(r"^(t5_proj|opt_proj|llm_proj|vision_proj|text_proj|itm_head|temp$|t5_model|opt_model)", key):
        return Ignored("another language model's projection or head")
    return None


def projector_target(key: str) -> Target | None:
    """Map ``llama_proj`` and ``llama_proj2``."""
    match = re.match(r"^llama_proj(2?)\.(weight|bias)$", key)
    return Target(f"projector.linear_{match[1] or 1}.{match[2]}") if match else None


# ---------------------------------------------------------------------- language model

_ATTENTION_RENAMES = {"query_key_value": "qkv_proj", "Wqkv": "qkv_proj", "out_proj": "dense"}


def language_target(key: str, last_sequential_layer: int | None = None) -> Target | Ignored | None:
    """Map a key of any of the four Phi-2 layouts, with or without LoRA; None means it is no language key.

    Args:
        key: plain foreign key, with or without ``llama_model.``.
        last_sequential_layer: index of the head "layer" of layout 1, where the file has that layout.
    """
    name = key.removeprefix("llama_model.")
    if re.search(r"(rotary_emb|inv_freq|inner_attn|inner_cross_attn|masked_bias|attn\.bias$)", name):
        return Ignored("a buffer that is computed")
    for pattern, build in _LANGUAGE_RULES:
        match = re.match(pattern, name)
        if match:
            return build(match, last_sequential_layer)
    return None


def _layer(index: str, rest: str) -> Target | None:
    rest = rest.replace("mixer.", "self_attn.")
    if re.match(r"^ln\.", rest):
        rest = "input_layernorm." + rest.rsplit(".", 1)[1]
    rest = rest.replace("post_layernorm.", "attention_rmsnorm.")
    match = re.match(r"^self_attn\.(\w+)\.(lora_[AB]\.weight|weight|bias)$", rest)
    prefix = f"language_model.layers.{index}"
    if match:
        module, leaf = match.groups()
        if module in SPLIT_PARTS:
            if leaf.startswith("lora_"):
                return None  # adapters of split projections have three A matrices; a fused one has room for one
            return Target(f"{prefix}.self_attn.qkv_proj.{leaf}", piece=SPLIT_PARTS.index(module))
        per_head = module == "query_key_value" and not leaf.startswith("lora_A")
        return Target(f"{prefix}.self_attn.{_ATTENTION_RENAMES.get(module, module)}.{leaf}", per_head=per_head)
    return Target(f"{prefix}.{rest}")


def _sequential(match: re.Match[str], last: int | None) -> Target | None:
    index, rest = int(match[1]), match[2]
    if rest == "wte.weight" and index == 0:
        return Target("language_model.embed_tokens.weight")
    if index == last:
        head = {"ln": "language_model.final_layernorm", "linear": "lm_head"}.get(rest.split(".")[0])
        return Target(f"{head}.{rest.rsplit('.', 1)[1]}") if head else None
    return _layer(str(index - 1), rest)


_LANGUAGE_RULES: tuple[tuple[str, Callable[[re.Match[str], int | None], Target | None]], ...] = (
    (r"^layers\.(\d+)\.(.+)$", _sequential),
    (r"^transformer\.embd\.wte\.weight$", lambda m, _: Target("language_model.embed_tokens.weight")),
    (r"^transformer\.h\.(\d+)\.(.+)$", lambda m, _: _layer(m[1], m[2])),
    (r"^lm_head\.ln\.(weight|bias)$", lambda m, _: Target(f"language_model.final_layernorm.{m[1]}")),
    (r"^lm_head\.linear\.(weight|bias)$", lambda m, _: Target(f"lm_head.{m[1]}")),
    (r"^model\.embed_tokens\.weight$", lambda m, _: Target("language_model.embed_tokens.weight")),
    (r"^model\.layers\.(\d+)\.(.+)$", lambda m, _: _layer(m[1], m[2])),
    (r"^model\.final_layernorm\.(weight|bias)$", lambda m, _: Target(f"language_model.final_layernorm.{m[1]}")),
    (r"^lm_head\.(weight|bias)$", lambda m, _: Target(f"lm_head.{m[1]}")),
)


def language_layout(keys: list[str]) -> str:
    """Name the layout that a language file has, for reports and errors."""
    text = " ".join(keys)
    if "layers.0.wte" in text and "transformer." not in text:
        return "layout 1 (sequential phi)"
    if "transformer.h." in text:
        return "layout 2 (phi-msft)"
    if "query_key_value" in text:
        return "layout 3 (transformers 4.36, fused)"
    if "q_proj" in text:
        return "layout 4 (transformers >= 4.37, split)"
    return "no known layout of Phi-2"


# ---------------------------------------------------------------------- our names -> the release's


def release_key(name: str, lora: bool) -> tuple[str, bool] | None:
    """The release's key for one of our plain names.

    Args:
        name: our plain name.
        lora: whether the release's model would be wrapped by peft.

    Returns:
        The key, and whether its rows go to [H, 3, W] order; None for a name that the release does not have.
    """
    for ours, theirs in (("projector.linear_1.", "llama_proj."), ("projector.linear_2.", "llama_proj2.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours), False
    if name.startswith("vision_encoder.vit."):
        return "visual_encoder." + name.removeprefix("vision_encoder.vit."), False
    if name.startswith("vision_encoder.ln_vision."):
        return name.removeprefix("vision_encoder."), False
    if name == "qformer.query_tokens":
        return "query_tokens", False
    if name.startswith("qformer.encoder.layernorm."):
        return "Qformer.bert.embeddings.LayerNorm." + name.rsplit(".", 1)[1], False
    if name.startswith("qformer.encoder.encoder.layer."):
        rest = name.removeprefix("qformer.encoder.encoder.")
        return "Qformer.bert.encoder." + re.sub(r"attention\.attention\.", "attention.self.", rest), False
    prefix = "llama_model.base_model.model." if lora else "llama_model."
    if name.startswith("lm_head."):
        return prefix + name, False
    if name.startswith("language_model."):
        rest = name.removeprefix("language_model.").replace("attention_rmsnorm.", "post_layernorm.")
        per_head = ".qkv_proj." in rest and ".lora_A." not in rest
        return f"{prefix}model.{rest.replace('.qkv_proj.', '.query_key_value.')}", per_head
    return None


def split_phi_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Our language tensor under the names of layout 4 (current transformers); empty for what Phi-2 does not have.

    Raises:
        ValueError: the tensor is a LoRA adapter: merge the adapters first.
    """
    if ".lora_" in name:
        raise ValueError(f"{name} is a LoRA adapter, which plain Phi-2 cannot hold: call model.merge_lora() first.")
    if name.startswith("lm_head."):
        return {name: tensor}
    if not name.startswith("language_model.") or re.search(r"(q_layernorm|k_layernorm|attention_rmsnorm)\.", name):
        return {}
    theirs = "model." + name.removeprefix("language_model.")
    if ".qkv_proj." not in theirs:
        return {theirs: tensor}
    thirds = torch.chunk(tensor, 3, dim=0)
    return {
        theirs.replace("qkv_proj", part): third.contiguous() for part, third in zip(SPLIT_PARTS, thirds, strict=True)
    }
