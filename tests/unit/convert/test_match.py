"""Which tensor of which file goes where: what is reported, and every refusal word for word, without files."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinygptv.checkpoint.weight_files import LazyTensor, WeightFileError
from tinygptv.convert import match
from tinygptv.convert.layouts import Ignored, Target
from tinygptv.convert.match import LoadReport, Piece, Release, decorator, match_release, whole_shape

LAYER = "language_model.layers"
QKV = f"{LAYER}.0.self_attn.qkv_proj.weight"
CONFIG = SimpleNamespace(lora_rank=0, text_config=SimpleNamespace(num_hidden_layers=2))


def lazy(key, shape=(1,), file="f.pth", value=None):
    return LazyTensor(Path(file), key, tuple(shape), lambda: value)


def piece(name, key="key", shape=(1,), file="f.pth", third=None, per_head=False, value=None):
    return Piece(lazy(key, shape, file, value), Target(name, third, per_head))


def refused(act, *arguments):
    with pytest.raises(WeightFileError) as caught:
        act(*arguments)
    return str(caught.value)


# ---------------------------------------------------------------------- the report


def test_a_report_counts_parts_layouts_what_is_fresh_and_what_is_ignored():
    report = LoadReport(
        counts={("vision_encoder", "b.pth"): 12, ("lm_head", "a.bin"): 2, ("vision_encoder", "a.bin"): 100_000},
        fresh=[
            f"{LAYER}.0.self_attn.q_layernorm.bias",
            "projector.linear_2.bias",
            f"{LAYER}.11.self_attn.q_layernorm.bias",
        ],
        ignored=[
            ("x", "b.pth", "a head"),
            ("y", "a.bin", "a head"),
            ("z", "b.pth", "a head"),
            ("w", "b.pth", "a buffer"),
        ],
        layouts={"a.bin": "layout 4", "c.bin": "layout 1"},
    )
    assert str(report).split("\n") == [
        "lm_head                2 tensors from a.bin",
        "vision_encoder     100000 tensors from a.bin",
        "vision_encoder        12 tensors from b.pth",
        "                   layout 4: a.bin",
        "                   layout 1: c.bin",
        "fresh                  2 x language_model.layers.*.self_attn.q_layernorm.bias",
        "fresh                  1 x projector.linear_2.bias",
        "ignored                2 tensors of b.pth: a head",
        "ignored                1 tensors of a.bin: a head",
        "ignored                1 tensors of b.pth: a buffer",
    ]
    assert str(LoadReport()) == ""


# ---------------------------------------------------------------------- one file


@pytest.fixture
def opened(monkeypatch):
    """Give a file its keys, in order."""

    def give(*keys):
        monkeypatch.setattr(match, "open_weights", lambda path: {key: lazy(key, file=path / "shard") for key in keys})

    return give


def matched(role, path="dir/f.pth"):
    report = LoadReport()
    pieces = match._match_file(role, Path(path), report)
    return {name: [p.tensor.key for p in found] for name, found in pieces.items()}, report


def test_a_file_is_matched_in_its_order_with_wrappers_undone_and_the_rest_reported(opened):
    opened("module.blocks.0.norm1.weight", "module.head.weight", "module.pos_embed")
    pieces, report = matched("vision")
    names = ["vision_encoder.vit.blocks.0.norm1.weight", "vision_encoder.vit.pos_embed"]
    assert list(pieces) == names and pieces[names[1]] == ["module.pos_embed"]
    assert [(key, file) for key, file, _ in report.ignored] == [("module.head.weight", "dir/f.pth/shard")]
    assert report.layouts == {} and report.counts == {}


@pytest.mark.parametrize(
    ("role", "key", "expected"),
    [
        ("vision", "query_tokens", "EVA ViT-g as in eva_vit_g.pth (cls_token, pos_embed, patch_embed.proj, blocks.*)"),
        ("qformer", "cls_token", "BLIP-2's Q-Former (query_tokens, ln_vision, Qformer.bert.*)"),
        ("language", "x", "Phi-2 in one of its four layouts (model.layers.*, transformer.h.* or layers.*)"),
        ("projection", "cls_token", "MiniGPT-4's projection (llama_proj.weight, llama_proj.bias)"),
        ("checkpoint", "x", "a TinyGPT-V stage file (llama_proj, llama_proj2, llama_model.*)"),
    ],
)
def test_a_file_without_the_parts_tensors_is_named_with_what_it_should_hold(opened, role, key, expected):
    opened(key, "other")
    assert refused(matched, role) == (
        f"dir/f.pth was given as {role}= but holds none of its tensors (it has 2, e.g. {key!r}); expected {expected}."
    )


def test_a_file_with_tensors_of_another_model_is_named_with_the_first(opened):
    opened("module.cls_token", "module.one", "two")
    assert refused(matched, "vision") == (
        "dir/f.pth, given as vision=, holds 2 tensors that belong to no part of this model, e.g. 'module.one': it "
        f"seems to be another model's file; expected {match._EXPECTED['vision']}."
    )


@pytest.mark.parametrize(
    ("role", "keys", "layout"),
    [
        ("language", ("model.layers.0.mlp.fc1.weight", "model.layers.0.self_attn.query_key_value.bias"), "layout 3"),
        ("checkpoint", ("llama_model.model.layers.0.mlp.fc1.bias",
                        *(f"llama_model.model.layers.0.self_attn.{part}_proj.bias" for part in "qkv")), "layout 4"),
        ("checkpoint", ("llama_proj.weight", "llama_model.model.layers.0.post_layernorm.weight"), None),
        ("vision", ("blocks.0.mlp.fc1.weight",), None),
    ],
)  # fmt: skip
def test_the_layout_is_told_of_files_with_the_whole_language_model(opened, role, keys, layout):
    opened(*keys)
    _, report = matched(role)
    assert {file: text.partition(" (")[0] for file, text in report.layouts.items()} == (
        {"dir/f.pth": layout} if layout else {}
    )


@pytest.mark.parametrize(
    ("role", "keys", "found"),
    [
        ("vision", ["visual_encoder.cls_token", "ln_vision.weight"], [Target, Target]),
        ("vision", ["cls_token", "ln_vision.weight"], [Target, None]),
        ("qformer", ["query_tokens", "cls_token"], [Target, None]),
        ("language", ["lm_head.weight", "llama_proj.weight"], [Target, None]),
        ("projection", ["llama_proj.weight", "query_tokens", "visual_encoder.cls_token", "lm_head.bias", "y"],
         [Target, Ignored, Ignored, Ignored, None]),
        ("checkpoint", ["llama_proj2.bias", "query_tokens", "cls_token", "llama_model.lm_head.bias", "y"],
         [Target, Target, Target, Target, None]),
    ],
)  # fmt: skip
def test_each_role_takes_its_own_tensors(role, keys, found):
    mappers = match._mappers(role, keys)
    targets = [next((t for mapper in mappers if (t := mapper(key)) is not None), None) for key in keys]
    assert [None if target is None else type(target) for target in targets] == found
    assert {t.reason for t in targets if isinstance(t, Ignored)} <= {"not the projection"}


def test_the_release_builds_39_of_its_encoders_40_blocks():
    assert match.RELEASE_VISION_DEPTH == 39 and match.MINIGPT4_13B_ROWS == 5120
    for blocks, kept in ((38, 38), (39, 39), (40, 39), (41, 41)):
        for prefix in ("", "visual_encoder."):
            names = [f"{prefix}blocks.{n}.attn.qkv.weight" for n in range(blocks)]
            vision = match._mappers("vision", names)[0]
            assert sum(isinstance(vision(name), Target) for name in names) == kept


def test_the_last_layer_of_layout_1_is_the_head_and_of_no_other():
    keys = ["layers.0.wte.weight", "layers.1.ln.weight", "layers.2.ln.weight"]
    (language,) = match._mappers("language", keys)
    assert language(keys[2]) == Target("language_model.final_layernorm.weight")
    assert language(keys[1]) == Target(f"{LAYER}.0.input_layernorm.weight")
    (language,) = match._mappers("language", keys[1:])
    assert language(keys[2]) == Target(f"{LAYER}.1.input_layernorm.weight"), "a part of a file has no head"
    (*_, language) = match._mappers("checkpoint", [f"llama_model.{key}" for key in keys])
    assert language(f"llama_model.{keys[2]}") == Target("language_model.final_layernorm.weight")


def test_folders_of_this_project_are_no_foreign_weights(tmp_path):
    refuse = lambda: refused(match._refuse_own_folder, "language", tmp_path)  # noqa: E731
    match._refuse_own_folder("language", tmp_path)
    for kind in ("phi", "tinygptv_text", "other_tinygptv"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        match._refuse_own_folder("language", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "tinygptv"}')
    match._refuse_own_folder("vision", tmp_path / "eva.pth")  # a file may lie beside one
    assert refuse() == (
        f"{tmp_path}, given as language=, is a checkpoint of this project, which needs no conversion: give the "
        f"original file, {match._EXPECTED['language']}."
    )
    (tmp_path / "quantization.json").touch()
    assert refuse() == f"{tmp_path}, given as language=, is a quantized artifact: give the original weights."


def test_a_file_with_two_of_three_projections_is_refused(opened):
    opened("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight")
    told = f"dir/f.pth lacks k_proj of {QKV}: split q, k and v projections come in threes."
    assert refused(matched, "language") == told


def test_thirds_come_in_threes_and_a_tensor_once():
    path = Path("f.pth")
    whole = [piece(QKV, third=n) for n in (2, 0, 1)]
    match._check_thirds({QKV: whole, "lm_head.bias": [piece("lm_head.bias")]}, path)
    assert refused(match._check_thirds, {QKV: whole[:1]}, path) == (
        f"f.pth lacks q_proj, k_proj of {QKV}: split q, k and v projections come in threes."
    )
    q, k, v = (piece(QKV, key, third=n) for n, key in enumerate("qkv"))
    for found, one, other in (
        ([piece(QKV, "x"), piece(QKV, "y")], "x", "y"),
        ([q, k, v, piece(QKV, "k2", third=1)], "k", "k2"),
        ([q, k, v, piece(QKV, "whole")], "q", "whole"),
        ([piece(QKV, "whole"), q, k, v], "whole", "q"),
    ):
        told = f"f.pth holds {one} and {other}, which are the same tensor."
        assert refused(match._check_thirds, {QKV: found}, path) == told


# ---------------------------------------------------------------------- all files


def test_pieces_make_a_whole_in_the_order_of_their_thirds_and_in_their_dtype(monkeypatch):
    text = SimpleNamespace(num_attention_heads=2)
    vision = SimpleNamespace(image_size=32, patch_size=16)
    config = SimpleNamespace(lora_rank=4, text_config=text, vision_config=vision)
    thirds = [piece(QKV, third=n, value=torch.full((2, 1), float(n))) for n in (2, 1, 0)]
    rows = torch.arange(6.0).view(6, 1)
    norm, embedding = f"{LAYER}.0.attention_rmsnorm.weight", "vision_encoder.vit.pos_embed"
    fused = f"{LAYER}.1.self_attn.qkv_proj.weight"
    pieces = {
        QKV: thirds,
        fused: [piece(fused, per_head=True, value=rows)],
        norm: [piece(norm, value=torch.ones(1).half())],
        embedding: [piece(embedding, value=torch.zeros(1, 10, 3))],
    }
    found = dict(Release(config, LoadReport(), pieces).tensors(torch.bfloat16))
    based = [name.replace("qkv_proj.", "qkv_proj.base_layer.") for name in (QKV, fused)]
    assert list(found) == [*based, norm, embedding]
    assert found[based[0]].flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert found[based[1]].flatten().tolist() == [0, 3, 1, 4, 2, 5], (
        "the q, k and v of each head, and all q before all k"
    )
    assert found[embedding].shape == (1, 5, 3), "resampled to 2 x 2 patches"
    assert [tensor.dtype for tensor in found.values()] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]
    assert dict(Release(config, LoadReport(), pieces).tensors())[embedding].dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [
        (torch.tensor([1.0009765625]).half(), None, torch.tensor([1.0009765625]).half()),
        (torch.tensor([1e38]).bfloat16(), None, torch.tensor([1e38]).bfloat16()),
        (torch.tensor([1.0009765625, 1e-6]), None, torch.tensor([1.0009765625, 1e-6]).half()),
        (torch.tensor([65520.0, 1.0]).double(), None, torch.tensor([65536.0, 1.0]).bfloat16()),
        (torch.tensor([65519.0]), torch.float16, torch.tensor([65504.0]).half()),
        (torch.tensor([65520.0]), torch.float16, "k of f.pth holds numbers beyond the range of torch.float16: "),
        (torch.tensor([1.0, math.nan]).half(), None, "k of f.pth holds NaN or infinite numbers: the file is damaged"),
        (torch.tensor([-math.inf]).bfloat16(), torch.float32, "k of f.pth holds NaN or infinite numbers"),
    ],
    ids=["float16", "bfloat16", "float32", "beyond float16", "asked for", "too large", "NaN", "infinite"],
)
def test_numbers_are_stored_as_their_file_holds_them_in_at_most_sixteen_bits(value, dtype, stored):
    vision = SimpleNamespace(image_size=32, patch_size=16)
    config = SimpleNamespace(lora_rank=0, text_config=SimpleNamespace(num_attention_heads=2), vision_config=vision)
    pieces = {"lm_head.bias": [piece("lm_head.bias", "k", value=value)]}
    tensors = Release(config, LoadReport(), pieces).tensors(dtype)
    if isinstance(stored, str):
        with pytest.raises(WeightFileError, match=stored):
            list(tensors)
    else:
        [(_, found)] = tensors
        assert found.dtype == stored.dtype and torch.equal(found, stored)


def test_thirds_are_stacked():
    thirds = [piece(QKV, shape=(n, 5, 7), third=n) for n in (1, 2, 3)]
    assert whole_shape(thirds) == (6, 5, 7) and whole_shape(thirds[:1]) == (1, 5, 7)


def test_names_with_adapters():
    names = {
        QKV: f"{LAYER}.0.self_attn.qkv_proj.base_layer.weight",
        f"{LAYER}.0.self_attn.dense.bias": f"{LAYER}.0.self_attn.dense.base_layer.bias",
        f"{LAYER}.0.self_attn.dense.lora_A.weight": f"{LAYER}.0.self_attn.dense.lora_A.default.weight",
        f"{LAYER}.0.self_attn.dense.lora_B.weight": f"{LAYER}.0.self_attn.dense.lora_B.default.weight",
        f"{LAYER}.0.mlp.fc1.weight": f"{LAYER}.0.mlp.fc1.weight",
        "qformer.encoder.x.dense.weight": "qformer.encoder.x.dense.weight",
    }
    with_adapters, without = decorator(SimpleNamespace(lora_rank=1)), decorator(CONFIG)
    assert {name: with_adapters(name) for name in names} == names
    assert all(without(name) == name for name in names)


def test_files_are_matched_in_order_and_later_ones_win(monkeypatch, tmp_path):
    read, checked, given_sizes = [], [], []

    def file(role, path, report):
        read.append((role, path))
        return {"same": [piece("same", role, shape=(len(read),))], role: [piece(role, role)]}

    class Sizes:
        def __init__(self, shapes, settings):
            given_sizes.append((shapes, settings))

        def config(self, *sizes):
            given_sizes.append(sizes)
            return "config"

    monkeypatch.setattr(match, "_match_file", file)
    monkeypatch.setattr(match, "Sizes", Sizes)
    monkeypatch.setattr(match, "_check", lambda *arguments: checked.append(arguments))
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    release = match_release("v", Path("q"), tmp_path, None, "c", 448, 4, 5, 7)
    assert read == [("vision", Path("v")), ("qformer", Path("q")), ("language", tmp_path), ("checkpoint", Path("c"))]
    assert release.pieces["same"][0].tensor.key == "checkpoint" and list(release.pieces) == [
        "same", "vision", "qformer", "language", "checkpoint",
    ]  # fmt: skip
    (shapes, settings), sizes = given_sizes
    assert shapes["same"] == (4,) and settings == {"n_head": 3} and sizes == (448, 4, 5, 7)
    assert release.config == "config"
    given = {"vision": "v", "qformer": "q", "language": str(tmp_path), "checkpoint": "c"}
    assert checked == [("config", release.pieces, release.report, given)]
    match_release(None, None, None, "p", None)
    assert read[4:] == [("projection", Path("p"))] and given_sizes[3] == (None, None, None, 16)


@pytest.fixture
def check(monkeypatch):
    """Check pieces against the tensors that a model needs."""

    def run(needed, found, given=(), config=CONFIG):
        monkeypatch.setattr(match, "tensor_shapes", lambda config: needed)
        report = LoadReport()
        pieces: dict[str, list[Piece]] = {}
        for each in found:
            pieces.setdefault(each.target.name, []).append(each)
        match._check(config, pieces, report, dict(given))
        return report

    return run


def test_what_a_model_needs_is_compared_with_what_the_files_supply(check):
    needed = {"lm_head.bias": (5,), "lm_head.weight": (5, 2), "vision_encoder.vit.pos_embed": (1, 5, 3)}
    found = [
        piece("lm_head.weight", "w", (5, 2), "a"),
        piece("lm_head.bias", "b", (5,), "a"),
        piece("vision_encoder.vit.pos_embed", "p", (1, 10, 3), "b"),  # resampled
    ]
    assert check(needed, found).counts == {("lm_head", "a"): 2, ("vision_encoder", "b"): 1}
    assert refused(check, needed, [*found, piece("more", "m", file="a")]) == (
        "m of a does not belong to a model of 2 language layers."
    )
    assert refused(check, needed, [piece("lm_head.bias", "b", (6,), "a")]) == (
        "b of a is [6] but the model needs [5] for lm_head.bias."
    )
    assert refused(check, needed, found[1:]) == (
        "no file supplies lm_head.weight [5, 2]: give the file that holds it (language=, the Phi-2 folder)."
    )


def test_the_projection_of_the_larger_minigpt4_is_named(check):
    needed = {"projector.linear_1.weight": (4096, 3), "projector.linear_1.bias": (5120,)}
    found = [piece("projector.linear_1.bias", "b", (5120,)), piece("projector.linear_1.weight", "w", (5120, 3))]
    assert refused(check, needed, found) == (
        "w of f.pth is [5120, 3]: that is the projection of MiniGPT-4 13B; the model needs the 7B one, [4096, 3]."
    )


LANGUAGE = "give the file that holds it (language=, the Phi-2 folder)"


@pytest.mark.parametrize(
    ("name", "at_a_start", "with_a_stage_file"),
    [
        (f"{LAYER}.0.self_attn.q_layernorm.bias", None, None),
        (f"{LAYER}.0.self_attn.k_layernorm.bias", None, None),
        (f"{LAYER}.0.self_attn.q_layernorm.weight", None, "c.pth lacks it"),
        (f"{LAYER}.0.self_attn.k_layernorm.weight", None, "c.pth lacks it"),
        (f"{LAYER}.0.attention_rmsnorm.weight", None, "c.pth lacks it"),
        ("projector.linear_2.bias", None, "c.pth lacks it"),
        (f"{LAYER}.0.self_attn.dense.lora_A.default.weight", LANGUAGE, "c.pth lacks it"),
        (f"{LAYER}.0.input_layernorm.weight", LANGUAGE, LANGUAGE),
        ("qformer.query_tokens", *["give the file that holds it (qformer=blip2_pretrained_flant5xxl.pth)"] * 2),
        ("vision_encoder.ln_vision.bias",
         *["give the file that holds it (vision=eva_vit_g.pth; its ln_vision is in BLIP-2's file, qformer=)"] * 2),
    ],
)  # fmt: skip
def test_what_may_be_lacking_starts_fresh_and_the_rest_is_asked_for(check, name, at_a_start, with_a_stage_file):
    plain = name.replace(".default.", ".")
    needed = {"lm_head.bias": (1,), name: (7,)}
    for given, told in (({"language": "l"}, at_a_start), ({"checkpoint": "c.pth"}, with_a_stage_file)):
        if told is None:
            assert check(needed, [piece("lm_head.bias")], given).fresh == [plain]
        else:
            assert refused(check, needed, [piece("lm_head.bias")], given) == f"no file supplies {plain} [7]: {told}."


def test_what_is_fresh_is_listed_by_name(check):
    names = [f"{LAYER}.{n}.self_attn.q_layernorm.bias" for n in range(9, -1, -1)]
    config = SimpleNamespace(lora_rank=2, text_config=CONFIG.text_config)
    needed = {QKV.replace(".weight", ".base_layer.weight"): (3,), **dict.fromkeys(names, (1,))}
    report = check(needed, [piece(QKV, shape=(3,))], config=config)
    assert report.fresh == names[::-1] and report.counts == {("language_model", "f.pth"): 1}
    thirds = [piece(QKV, f"third {n}", (1,), file, n) for n, file in enumerate("abc")]
    assert check(needed, thirds, config=config).counts == {("language_model", "a"): 1}, "of several shards, the first"
    assert refused(check, needed, [*thirds, thirds[0]], (), config) == (
        f"third 0 of a is [4] but the model needs [3] for {QKV}."
    )
