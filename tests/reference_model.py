"""TinyGPT-V once more, written plainly from its formulas, on the release's own state dicts: what ours is compared with.

No module, no cache, no fused kernel, one head and one sample at a time where that is plainer. float64 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state.get(f"{name}.bias", 0.0)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def heads_of(x: Tensor, heads: int) -> list[Tensor]:
    return list(x.split(x.shape[-1] // heads, dim=-1))


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """One head of one sample: [T, H], [S, H], [S, H]; ``seen`` [T, S] says what may be looked at."""
    scores = query @ key.T / query.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ value


# ------------------------------------------------------------------ image


def cubic(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.75."""
    d, a = distance.abs(), -0.75
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def resize_matrix(old: int, new: int) -> Tensor:
    """[new, old]: bicubic resampling of one axis, corners not aligned, border values repeated."""
    centres = (torch.arange(new).double() + 0.5) * old / new - 0.5
    rows = torch.zeros(new, old).double()
    for i, centre in enumerate(centres):
        for tap in range(int(centre.floor()) - 1, int(centre.floor()) + 3):
            rows[i, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    return rows


def resample_positions(pos_embed: Tensor, side: int) -> Tensor:
    """A learned position embedding [1, P + 1, V] for another patch grid; the class token's row stays."""
    grid = round((pos_embed.shape[1] - 1) ** 0.5)
    plane = pos_embed[0, 1:].double().reshape(grid, grid, -1)
    along = resize_matrix(grid, side)
    resized = torch.einsum("ya,xb,abv->yxv", along, along, plane).reshape(side * side, -1)
    return torch.cat([pos_embed[0, :1].double(), resized])[None]


def encode_image(vision: State, qformer: State, pixels: Tensor, heads: int) -> Tensor:
    """[3, R, R] -> query features [Q, F]."""
    width, _, patch, _ = vision["patch_embed.proj.weight"].shape
    side = pixels.shape[-1] // patch
    patches = [
        pixels[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] for r in range(side) for c in range(side)
    ]
    kernel = vision["patch_embed.proj.weight"].reshape(width, -1)
    rows = torch.stack([p.reshape(-1) for p in patches]) @ kernel.T + vision["patch_embed.proj.bias"]
    x = torch.cat([vision["cls_token"][0], rows]) + vision["pos_embed"][0]
    for i in range(1 + max(int(k.split(".")[1]) for k in vision if k.startswith("blocks."))):
        name = f"blocks.{i}"
        bias = torch.cat([vision[f"{name}.attn.q_bias"], torch.zeros(width).double(), vision[f"{name}.attn.v_bias"]])
        qkv = layer_norm(vision, f"{name}.norm1", x, 1e-6) @ vision[f"{name}.attn.qkv.weight"].T + bias
        q, k, v = (heads_of(part, heads) for part in qkv.split(width, dim=-1))
        x = x + linear(vision, f"{name}.attn.proj", torch.cat([attend(*qkv) for qkv in zip(q, k, v, strict=True)], -1))
        hidden = gelu(linear(vision, f"{name}.mlp.fc1", layer_norm(vision, f"{name}.norm2", x, 1e-6)))
        x = x + linear(vision, f"{name}.mlp.fc2", hidden)
    patches_seen = layer_norm(qformer, "ln_vision", x, 1e-5)

    queries = layer_norm(qformer, "Qformer.bert.embeddings.LayerNorm", qformer["query_tokens"][0], 1e-12)
    for i in range(1 + max(int(k.split(".")[4]) for k in qformer if ".encoder.layer." in k)):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for block in ("attention", "crossattention"):
            if f"{layer}.{block}.self.query.weight" not in qformer:
                continue
            source = patches_seen if block == "crossattention" else queries
            q = heads_of(linear(qformer, f"{layer}.{block}.self.query", queries), heads)
            k = heads_of(linear(qformer, f"{layer}.{block}.self.key", source), heads)
            v = heads_of(linear(qformer, f"{layer}.{block}.self.value", source), heads)
            mixed = torch.cat([attend(*head) for head in zip(q, k, v, strict=True)], -1)
            queries = layer_norm(
                qformer,
                f"{layer}.{block}.output.LayerNorm",
                linear(qformer, f"{layer}.{block}.output.dense", mixed) + queries,
                1e-12,
            )
        hidden = gelu(linear(qformer, f"{layer}.intermediate_query.dense", queries))
        queries = layer_norm(
            qformer,
            f"{layer}.output_query.LayerNorm",
            linear(qformer, f"{layer}.output_query.dense", hidden) + queries,
            1e-12,
        )
    return queries


def project(stage: State, features: Tensor) -> Tensor:
    return linear(stage, "llama_proj2", linear(stage, "llama_proj", features))


# ------------------------------------------------------------------ language


def adapted(state: State, name: str, x: Tensor, scale: float) -> Tensor:
    """A linear layer with its LoRA adapter, where it has one."""
    y = linear(state, name, x)
    if f"{name}.lora_A.weight" in state:
        y = y + scale * (x @ state[f"{name}.lora_A.weight"].T @ state[f"{name}.lora_B.weight"].T)
    return y


def rotate(x: Tensor, positions: Tensor, rotary: int) -> Tensor:
    """The first ``rotary`` of a head's columns turn, first half against second half."""
    half = rotary // 2
    angles = positions[:, None].double() / 10000.0 ** (torch.arange(half).double() * 2 / rotary)
    first, second, rest = x[:, :half], x[:, half:rotary], x[:, rotary:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def language(state: State, embeds: Tensor, mask: Tensor, heads: int, rotary: int, scale: float) -> Tensor:
    """Logits [T, K] of one sample; ``state`` has layout 3's names, with the release's norms and adapters.

    Positions count from 0 whatever the mask [T] says.
    """
    length = len(embeds)
    positions = torch.arange(length)
    seen = torch.tril(torch.ones(length, length, dtype=torch.bool)) & mask.bool()[None, :]
    x = embeds
    for i in range(1 + max(int(k.split(".")[2]) for k in state if k.startswith("model.layers."))):
        layer = f"model.layers.{i}"
        h = layer_norm(state, f"{layer}.input_layernorm", x, 1e-5)
        fused = adapted(state, f"{layer}.self_attn.query_key_value", h, scale)
        mixed = []
        for head in heads_of(fused, heads):  # each holds its q, k and v side by side
            q, k, v = head.chunk(3, dim=-1)
            q = rotate(layer_norm(state, f"{layer}.self_attn.q_layernorm", q, 1e-5), positions, rotary)
            k = rotate(layer_norm(state, f"{layer}.self_attn.k_layernorm", k, 1e-5), positions, rotary)
            mixed.append(attend(q, k, v, seen))
        attended = adapted(state, f"{layer}.self_attn.dense", torch.cat(mixed, -1), scale)
        root = (attended.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        attended = attended / root * state[f"{layer}.post_layernorm.weight"]
        x = x + attended + linear(state, f"{layer}.mlp.fc2", gelu_new(linear(state, f"{layer}.mlp.fc1", h)))
    return linear(state, "lm_head", layer_norm(state, "model.final_layernorm", x, 1e-5))


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sum of the token losses of one sample, and how many there are; labels [T] are unshifted."""
    chosen = (labels[1:] != -100).nonzero()[:, 0]
    scores = logits[:-1].log_softmax(-1)
    return -scores[chosen, labels[1:][chosen]].sum(), len(chosen)
