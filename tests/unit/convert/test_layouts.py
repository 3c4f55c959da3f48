"""Names of every layout, key by key: where each goes, what is left out, and what no layout knows."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tinygptv.convert
from tinygptv.checkpoint.weight_files import LazyTensor
from tinygptv.convert import write
from tinygptv.convert.layouts import (
    Ignored,
    Target,
    language_layout,
    language_target,
    plain_key,
    projector_target,
    qformer_target,
    release_key,
    split_phi_tensors,
    vision_target,
)
from tinygptv.convert.match import RELEASE_VISION_DEPTH, _mappers
from tinygptv.convert.write import check_file_output, write_shards

LAYER = "language_model.layers"
ATTENTION = f"{LAYER}.0.self_attn"
NO_HEAD = "the encoder has no final norm, head or relative position bias"
FUSED = "model.layers.0.self_attn.query_key_value."


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("module.a.b", "a.b"),
        ("model.module.a", "a"),
        ("_orig_mod.a", "a"),
        ("module._orig_mod.a", "a"),
        ("_orig_mod.module.a", "a"),
        ("model.layers.0.w", "model.layers.0.w"),
        ("a.module.b", "a.module.b"),
        ("base_model.model.model.x.base_layer.weight", "model.x.weight"),
        ("llama_model.base_model.model.model.x.lora_A.default.weight", "llama_model.model.x.lora_A.weight"),
        ("llama_model.x.lora_B.default.weight", "llama_model.x.lora_B.weight"),
    ],
)
def test_names_without_their_wrappers(key, plain):
    assert plain_key(key) == plain


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("pos_embed", "pos_embed"),
        ("visual_encoder.cls_token", "cls_token"),
        ("blocks.0.attn.q_bias", "blocks.0.attn.q_bias"),
        ("blocks.2.mlp.fc2.weight", "blocks.2.mlp.fc2.weight"),
        ("blocks.3.mlp.fc2.weight", Ignored("the model ends after block 2")),
        (
            "blocks.1.attn.relative_position_index",
            Ignored(NO_HEAD),
        ),
        ("fc_norm.weight", Ignored(NO_HEAD)),
        ("visual_encoder.something", Ignored("no tensor of the encoder")),
        ("something", None),
    ],
)
def test_names_of_the_encoder(key, found):
    target = vision_target(key, 3)
    assert target == (Target(f"vision_encoder.vit.{found}") if isinstance(found, str) else found)


@pytest.mark.parametrize(
    ("blocks", "last_is_kept"), [(5, True), (RELEASE_VISION_DEPTH, True), (RELEASE_VISION_DEPTH + 1, False), (45, True)]
)
@pytest.mark.parametrize("prefix", ["", "visual_encoder."])
def test_the_release_leaves_the_last_of_40_blocks_out_and_no_other(blocks, last_is_kept, prefix):
    keys = [f"{prefix}blocks.{n}.norm1.weight" for n in range(blocks)]
    vision, *more = _mappers("vision", keys)
    assert isinstance(vision(keys[-1]), Target) is last_is_kept and isinstance(vision(keys[-2]), Target)
    assert bool(more) == bool(prefix), "a file with the prefix may hold ln_vision too"


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("query_tokens", "qformer.query_tokens"),
        ("ln_vision.bias", "vision_encoder.ln_vision.bias"),
        ("Qformer.bert.embeddings.LayerNorm.weight", "qformer.encoder.layernorm.weight"),
        (
            "bert.encoder.layer.3.crossattention.self.query.bias",
            "qformer.encoder.encoder.layer.3.crossattention.attention.query.bias",
        ),
        (
            "Qformer.bert.encoder.layer.0.output_query.dense.weight",
            "qformer.encoder.encoder.layer.0.output_query.dense.weight",
        ),
        ("Qformer.bert.encoder.layer.0.output.dense.weight", "text branch"),
        ("Qformer.bert.embeddings.word_embeddings.weight", "text branch"),
        ("Qformer.cls.predictions.bias", "text branch"),
        ("t5_proj.weight", "another language model"),
        ("temp", "another language model"),
        ("template", None),
        ("llama_proj.weight", None),
    ],
)
def test_names_of_the_q_former(key, found):
    target = qformer_target(key)
    if isinstance(target, Ignored):
        assert target.reason.startswith(found)
    else:
        assert target == (Target(found) if found else None)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("llama_proj.weight", "projector.linear_1.weight"),
        ("llama_proj2.bias", "projector.linear_2.bias"),
        ("llama_proj3.bias", None),
        ("xllama_proj.bias", None),
        ("llama_proj.weight.x", None),
    ],
)
def test_names_of_the_projector(key, name):
    assert projector_target(key) == (Target(name) if name else None)


@pytest.mark.parametrize(
    ("key", "target"),
    [
        # layout 1: the layers are counted from the embedding on, and the last is the head
        ("layers.0.wte.weight", Target("language_model.embed_tokens.weight")),
        ("layers.1.wte.weight", Target(f"{LAYER}.0.wte.weight")),
        ("layers.1.ln.bias", Target(f"{LAYER}.0.input_layernorm.bias")),
        ("layers.1.mixer.Wqkv.weight", Target(f"{ATTENTION}.qkv_proj.weight")),
        ("layers.3.mixer.out_proj.bias", Target(f"{LAYER}.2.self_attn.dense.bias")),
        ("layers.3.mlp.fc1.bias", Target(f"{LAYER}.2.mlp.fc1.bias")),
        ("layers.4.ln.weight", Target("language_model.final_layernorm.weight")),
        ("layers.4.linear.bias", Target("lm_head.bias")),
        ("layers.4.loss.weight", None),
        # layout 2
        ("transformer.embd.wte.weight", Target("language_model.embed_tokens.weight")),
        ("transformer.h.4.mixer.Wqkv.bias", Target(f"{LAYER}.4.self_attn.qkv_proj.bias")),
        ("transformer.h.0.mixer.inner_attn.x", Ignored("a buffer that is computed")),
        ("lm_head.ln.weight", Target("language_model.final_layernorm.weight")),
        ("lm_head.linear.weight", Target("lm_head.weight")),
        # layout 3, with the release's norms and adapters
        (
            "llama_model.model.layers.1.self_attn.query_key_value.weight",
            Target(f"{LAYER}.1.self_attn.qkv_proj.weight", per_head=True),
        ),
        (
            "model.layers.1.self_attn.query_key_value.lora_A.weight",
            Target(f"{LAYER}.1.self_attn.qkv_proj.lora_A.weight"),
        ),
        (
            "model.layers.1.self_attn.query_key_value.lora_B.weight",
            Target(f"{LAYER}.1.self_attn.qkv_proj.lora_B.weight", per_head=True),
        ),
        ("model.layers.1.post_layernorm.weight", Target(f"{LAYER}.1.attention_rmsnorm.weight")),
        ("model.layers.1.self_attn.q_layernorm.bias", Target(f"{LAYER}.1.self_attn.q_layernorm.bias")),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", Ignored("a buffer that is computed")),
        # layout 4
        ("model.embed_tokens.weight", Target("language_model.embed_tokens.weight")),
        *(
            (f"model.layers.0.self_attn.{part}.bias", Target(f"{ATTENTION}.qkv_proj.bias", piece=n))
            for n, part in enumerate(("q_proj", "k_proj", "v_proj"))
        ),
        *(
            (f"model.layers.0.self_attn.{part}_proj.lora_{which}.weight", None)
            for part, which in ("qA", "qB", "kA", "kB", "vA", "vB")
        ),
        ("model.final_layernorm.bias", Target("language_model.final_layernorm.bias")),
        ("lm_head.weight", Target("lm_head.weight")),
        ("model.norm.weight", None),
        ("x.model.embed_tokens.weight", None),
    ],
)
def test_names_of_the_language_model(key, target):
    assert language_target(key, 4) == target


def test_without_layout_1_no_layer_is_the_head():
    for index in (0, 1, 4):
        target = language_target(f"layers.{index}.ln.weight")
        assert target == Target(f"{LAYER}.{index - 1}.input_layernorm.weight")


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        (["layers.0.wte.weight", "layers.1.mixer.Wqkv.weight"], "layout 1 (sequential phi)"),
        (["transformer.embd.wte.weight", "transformer.h.0.mixer.Wqkv.weight"], "layout 2 (phi-msft)"),
        (["model.layers.0.self_attn.query_key_value.weight"], "layout 3 (transformers 4.36, fused)"),
        (["model.layers.0.self_attn.q_proj.weight"], "layout 4 (transformers >= 4.37, split)"),
        (["model.layers.0.self_attn.qkv.weight"], "no known layout of Phi-2"),
    ],
)
def test_layouts_by_name(keys, number):
    assert language_layout(keys) == number


@pytest.mark.parametrize(
    ("name", "key", "per_head"),
    [
        ("projector.linear_1.weight", "llama_proj.weight", False),
        ("projector.linear_2.bias", "llama_proj2.bias", False),
        ("vision_encoder.vit.blocks.0.norm1.weight", "visual_encoder.blocks.0.norm1.weight", False),
        ("vision_encoder.vit.pos_embed", "visual_encoder.pos_embed", False),
        ("vision_encoder.ln_vision.weight", "ln_vision.weight", False),
        ("qformer.query_tokens", "query_tokens", False),
        ("qformer.encoder.layernorm.bias", "Qformer.bert.embeddings.LayerNorm.bias", False),
        (
            "qformer.encoder.encoder.layer.1.crossattention.attention.key.bias",
            "Qformer.bert.encoder.layer.1.crossattention.self.key.bias",
            False,
        ),
        (
            "qformer.encoder.encoder.layer.1.attention.attention.key.bias",
            "Qformer.bert.encoder.layer.1.attention.self.key.bias",
            False,
        ),
        ("lm_head.weight", "{}lm_head.weight", False),
        (f"{LAYER}.0.attention_rmsnorm.weight", "{}model.layers.0.post_layernorm.weight", False),
        (f"{ATTENTION}.qkv_proj.bias", "{}" + FUSED + "bias", True),
        (f"{ATTENTION}.qkv_proj.lora_A.weight", "{}" + FUSED + "lora_A.weight", False),
        (f"{ATTENTION}.qkv_proj.lora_B.weight", "{}" + FUSED + "lora_B.weight", True),
        (f"{LAYER}.0.self_attn.dense.weight", "{}model.layers.0.self_attn.dense.weight", False),
    ],
)
def test_the_releases_names_and_back(name, key, per_head):
    for lora, prefix in ((True, "llama_model.base_model.model."), (False, "llama_model.")):
        release = key.format(prefix)
        assert release_key(name, lora) == (release, per_head)
        plain = plain_key(release)
        found = projector_target(plain) or qformer_target(plain) or vision_target(plain, 9) or language_target(plain)
        assert found == Target(name, per_head=per_head)
    assert release_key("other.weight", True) is None


def test_the_split_layout_has_thirds_and_no_added_norms():
    rows = torch.arange(6.0).view(6, 1)
    thirds = split_phi_tensors(f"{ATTENTION}.qkv_proj.weight", rows)
    assert {name: part.flatten().tolist() for name, part in thirds.items()} == {
        "model.layers.0.self_attn.q_proj.weight": [0, 1],
        "model.layers.0.self_attn.k_proj.weight": [2, 3],
        "model.layers.0.self_attn.v_proj.weight": [4, 5],
    }
    for name, theirs in (
        ("lm_head.bias", "lm_head.bias"),
        (f"{LAYER}.0.input_layernorm.bias", "model.layers.0.input_layernorm.bias"),
        ("language_model.final_layernorm.bias", "model.final_layernorm.bias"),
    ):
        ((key, same),) = split_phi_tensors(name, rows).items()
        assert key == theirs and same is rows
    for name in ("self_attn.q_layernorm.weight", "self_attn.k_layernorm.bias", "attention_rmsnorm.weight"):
        assert split_phi_tensors(f"{LAYER}.0.{name}", rows) == {}
    assert split_phi_tensors("projector.linear_1.weight", rows) == {}
    for part in ("lora_A", "lora_B"):
        name = f"{LAYER}.0.self_attn.dense.{part}.weight"
        with pytest.raises(ValueError) as caught:
            split_phi_tensors(name, rows)
        assert str(caught.value) == (
            f"{name} is a LoRA adapter, which plain Phi-2 cannot hold: call model.merge_lora() first."
        )


# ---------------------------------------------------------------------- writing


class Large:
    """A tensor that says it has so many bytes."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def contiguous(self):
        return torch.zeros(1)


def test_progress_is_what_has_been_written_in_all(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_shards(tmp_path, ((str(n), Large(2 * 10**9)) for n in range(3)), 10**9)
    assert caplog.messages == [f"{written} GB written ..." for written in ("2.0", "4.0")]


def test_a_file_is_not_written_over_a_folder_even_an_empty_one(tmp_path):
    from tinygptv.checkpoint.folders import CheckpointError

    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"output .*empty is a folder: give the path of a new file"):
        check_file_output(tmp_path / "empty", [])
    check_file_output(tmp_path / "new.pth", [])


def test_what_is_fresh_follows_the_files_tensors_in_the_same_dtype(monkeypatch):
    release = SimpleNamespace(tensors=lambda dtype: [("file", dtype)])
    monkeypatch.setattr(write, "build_fresh", lambda release, dtype: [("fresh", dtype)])
    assert list(write._all_tensors(release, torch.float16)) == [("file", torch.float16), ("fresh", torch.float16)]


def test_an_adapters_scaled_product_is_added_to_its_matrix_alone_in_the_matrix_dtype():
    name = f"{LAYER}.0.self_attn.dense"
    tensors = {
        f"{name}.base_layer.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).bfloat16(),
        f"{name}.base_layer.bias": torch.ones(2),
        f"{name}.lora_A.default.weight": torch.tensor([[1.0, 0.0]]),
        f"{name}.lora_B.default.weight": torch.tensor([[2.0], [4.0]]),
        f"{LAYER}.0.mlp.fc1.weight": torch.ones(1),
    }
    weights = {key: LazyTensor(Path("f"), key, tuple(t.shape), lambda t=t: t) for key, t in tensors.items()}
    config = SimpleNamespace(lora_alpha=6, lora_rank=2)
    merged = write._merged(f"{name}.base_layer.weight", weights, config)
    assert merged.tolist() == [[7, 2], [15, 4]] and merged.dtype == torch.bfloat16
    for other in (f"{name}.base_layer.bias", f"{LAYER}.0.mlp.fc1.weight"):
        assert write._merged(other, weights, config) is tensors[other]


def test_merged_adapters_are_in_no_stage_file_even_beside_new_ones(tmp_path, monkeypatch):
    config = SimpleNamespace(lora_merged=True, lora_rank=4)
    monkeypatch.setattr(write, "read_source", lambda checkpoint: config)
    with pytest.raises(ValueError, match=r"are merged into its weights"):
        write.write_release_stage(tmp_path / "checkpoint", tmp_path / "stage.pth")
    assert list(tmp_path.iterdir()) == []


def test_the_package_has_what_it_names_and_nothing_else():
    from tinygptv.convert.load import load_release

    assert tinygptv.convert.load_release is load_release
    with pytest.raises(AttributeError, match=r"module 'tinygptv\.convert' has no attribute 'other'"):
        tinygptv.convert.other  # noqa: B018
