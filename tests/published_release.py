"""The release as its publishers serve it, in small: random weights under the published names, layouts and addresses."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file

from pipelines.fetch.addresses import published_address
from tests.release_files import language_state, qformer_state, stage_state, vision_state
from tinygptv.convert.layouts import plain_key
from tinygptv.convert.sources import all_parts
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

HEADS = 4
"""Of the language model. The encoder and the Q-Former have one head each, of the release's widths (88 and 64)."""
SIZES = {
    "vision_config": {
        "image_size": 28, "patch_size": 14, "hidden_size": 88, "num_hidden_layers": 2, "num_attention_heads": 1,
        "intermediate_size": 48,
    },
    "qformer_config": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 32,
        "encoder_hidden_size": 88, "cross_attention_frequency": 2,
    },
}  # fmt: skip
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def publish_release(server, folder, image_size=28):
    """Put every file of ``tinygptv.convert.sources`` on a ``FileServer``; returns the model that it was made from."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vision_config": {**SIZES["vision_config"], "image_size": image_size}}
    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=4, **sizes)).eval()
    plain = {plain_key(name): tensor for name, tensor in model.state_dict().items()}
    folder.mkdir()
    write_files(folder, plain)
    for part in all_parts().values():
        for file in part.files:
            local = folder / file.path.replace("phi-2-susnato", "phi-2")
            server.files[urlsplit(published_address(file)).path] = local.read_bytes()
    return model


def write_files(folder, plain):
    """All published files of a small model, by their local names."""
    torch.save(vision_state(plain), folder / "eva_vit_g.pth")
    extra = {"t5_proj.weight": torch.zeros(3, 3), "Qformer.bert.embeddings.position_ids": torch.arange(5)}
    torch.save({"model": qformer_state(plain) | extra}, folder / "blip2_pretrained_flant5xxl.pth")
    weight = torch.randn(plain["projector.linear_1.weight"].shape)
    projection = {"llama_proj.weight": weight, "llama_proj.bias": torch.zeros(len(weight))}
    torch.save({"model": projection}, folder / "prerained_minigpt4_7b.pth")
    for number in (1, 2, 3, 4):
        state = stage_state(plain, heads=HEADS)
        if number == 1:  # the released stage 1 has no LoRA
            state = {key.replace("base_model.model.", ""): t for key, t in state.items() if ".lora_" not in key}
        content = {"model": state, "config": {}, "epoch": 0}
        torch.save(content, folder / f"TinyGPT-V_for_Stage{number}.pth")
    write_phi2(folder / "phi-2", plain)


def write_phi2(folder, plain):
    """Microsoft's folder: the split layout in two shards, configuration and tokenizer."""
    tiny_tokenizer().save_pretrained(folder)
    state = {name: tensor.half().contiguous() for name, tensor in language_state(plain, "split", HEADS).items()}
    names = sorted(state)
    weight_map = {}
    for file, keys in zip(_SHARDS, (names[::2], names[1::2]), strict=True):
        save_file({key: state[key] for key in keys}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "phi", "num_attention_heads": HEADS, "partial_rotary_factor": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in (
        ("special_tokens_map.json", json.dumps({"eos_token": "<|endoftext|>"})),
        ("added_tokens.json", "{}"),
        ("vocab.json", json.dumps(tiny_tokenizer().get_vocab())),
        ("merges.txt", "#version: 0.2\n"),
        ("LICENSE", "MIT\n"),
    ):
        if not (folder / name).is_file():
            (folder / name).write_text(text)
