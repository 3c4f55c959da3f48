"""The release's files, made from a random model of ours: what conversions and comparisons start from."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from tinygptv.convert import load_release
from tinygptv.convert.layouts import interleave_heads, release_key, split_phi_tensors
from tinygptv.miniature.tiny import tiny_tokenizer

HEADS = 4


def load(files, **changes):
    """The model of such files."""
    return load_release(**{**files, **changes}, vision_heads=HEADS, qformer_heads=HEADS)


def write_release(folder, plain, heads=HEADS):
    """All files of a release, by the argument of ``load_release`` that takes them."""
    torch.save(vision_state(plain), folder / "eva_vit_g.pth")
    extra = {"t5_proj.weight": torch.zeros(3, 3), "Qformer.bert.embeddings.position_ids": torch.arange(5)}
    torch.save({"model": qformer_state(plain) | extra}, folder / "blip2.pth")
    write_language(folder / "phi-2", plain, "fused", heads=heads)
    torch.save({"model": stage_state(plain, heads=heads)}, folder / "stage.pth")
    return {
        "vision": folder / "eva_vit_g.pth",
        "qformer": folder / "blip2.pth",
        "language": folder / "phi-2",
        "checkpoint": folder / "stage.pth",
    }


def double(state):
    """The tensors in float64."""
    return {name: tensor.double() for name, tensor in state.items()}


def vision_state(plain):
    prefix = "vision_encoder.vit."
    return {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}


def qformer_state(plain):
    names = [name for name in plain if name.startswith(("qformer.", "vision_encoder.ln_vision"))]
    return {release_key(name, lora=False)[0]: plain[name] for name in names}


def stage_state(plain, style="peft 0.2", heads=4):
    """A stage file's tensors: what the release trains, under its names and in its row order."""
    state = {}
    for name, tensor in plain.items():
        trained = name.startswith("projector.") or ".lora_" in name or ("norm." in name and name.endswith("weight"))
        if trained and name.startswith(("projector.", "language_model.")):
            key, per_head = release_key(name, lora=True)
            if style == "peft new":
                key = key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
            state[key] = interleave_heads(tensor, heads) if per_head else tensor
    return state


def language_state(plain, layout, heads=4):
    """Phi-2's own tensors in one of the four layouts."""
    base = {k: v for k, v in plain.items() if k.startswith(("language_model.", "lm_head.")) and ".lora_" not in k}
    base = {
        k: v for k, v in base.items() if not any(n in k for n in ("q_layernorm", "k_layernorm", "attention_rmsnorm"))
    }
    state = {}
    for name, tensor in base.items():
        if layout == "split":
            state |= split_phi_tensors(name, tensor)
            continue
        key, per_head = release_key(name, lora=False)
        key = key.removeprefix("llama_model.")
        if layout == "fused":
            state[key] = interleave_heads(tensor, heads) if per_head else tensor
            continue
        key = key.replace("self_attn.query_key_value", "mixer.Wqkv").replace("self_attn.dense", "mixer.out_proj")
        key = key.replace("input_layernorm", "ln")
        if layout == "msft":
            key = key.replace("model.embed_tokens", "transformer.embd.wte").replace("model.layers", "transformer.h")
            key = key.replace("lm_head", "lm_head.linear").replace("model.final_layernorm", "lm_head.ln")
        else:
            last = 1 + max(int(k.split(".")[2]) for k in base if ".layers." in k)
            if key.startswith("model.layers."):
                _, _, index, rest = key.split(".", 3)
                key = f"layers.{int(index) + 1}.{rest}"
            key = key.replace("model.embed_tokens", "layers.0.wte").replace("lm_head", f"layers.{last + 1}.linear")
            key = key.replace("model.final_layernorm", f"layers.{last + 1}.ln")
        state[key] = tensor
    if layout in ("msft", "sequential"):
        state[
            "transformer.h.0.mixer.rotary_emb.inv_freq" if layout == "msft" else "layers.1.mixer.rotary_emb.inv_freq"
        ] = torch.zeros(4)
    return state


def write_language(folder, plain, layout, dtype=torch.float32, form="safetensors", heads=4):
    """A Phi-2 folder in one of the four layouts, as one file, a pickle or a sharded set."""
    folder.mkdir(exist_ok=True)
    state = {k: v.to(dtype).contiguous() for k, v in language_state(plain, layout, heads).items()}
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": heads, "partial_rotary_factor": 0.5}))
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = sorted(state)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, keys in halves.items():
            save_file({k: state[k] for k in keys}, folder / file)
        weight_map = {k: file for file, keys in halves.items() for k in keys}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tiny_tokenizer().save_pretrained(folder)
