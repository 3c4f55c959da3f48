"""Every layout in the wild loads exactly, or fails with a sentence that says why."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from transformers import PhiConfig, PhiForCausalLM

from tests.release_files import HEADS, language_state, load, stage_state, write_language, write_release
from tests.training_runs import assert_same_weights
from tinygptv.checkpoint import weight_files
from tinygptv.checkpoint.weight_files import WeightFileError, open_weights
from tinygptv.convert import load_release, match
from tinygptv.convert.layouts import interleave_heads, release_key, separate_heads
from tinygptv.convert.load import build_fresh
from tinygptv.convert.write import write_shards
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration


@pytest.fixture(scope="module")
def whole(plain, tmp_path_factory):
    """The model that the release's own files give."""
    return load(write_release(tmp_path_factory.mktemp("whole"), plain, HEADS))


def assert_same(loaded, model, *, except_lora=False):
    ours, wanted = loaded.state_dict(), model.state_dict()
    for name, tensor in wanted.items():
        if except_lora and ".lora_" in name:
            continue
        assert torch.equal(ours[name].float(), tensor), name


def test_whole_release_loads_exactly(files, model):
    # Biases of q and k norms are in no stage file: they are zero in the release.
    loaded = load(files)
    for name, tensor in model.state_dict().items():
        ours = loaded.state_dict()[name]
        if name.endswith(("q_layernorm.bias", "k_layernorm.bias")):
            assert ours.abs().sum() == 0
        else:
            assert torch.equal(ours, tensor), name
    text = str(loaded.load_report)
    assert "layout 3" in text and "t5_proj" not in text and "another language model's projection" in text


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        ("fused", "bin"),
        ("split", "safetensors"),
        ("split", "sharded"),
        ("msft", "safetensors"),
        ("msft", "bin"),
        ("sequential", "sharded"),
    ],
)
def test_four_phi2_layouts_give_the_same_model(tmp_path, files, plain, whole, layout, form):
    folder = tmp_path / "other"
    write_language(folder, plain, layout, form=form)
    assert_same_weights(load(files, language=folder), whole)


def test_the_block_that_the_release_leaves_out_is_ignored(files, whole, plain, monkeypatch):
    """The public eva_vit_g.pth has forty blocks; the release builds 39."""
    monkeypatch.setattr(match, "RELEASE_VISION_DEPTH", 2)
    state = torch.load(files["vision"])
    extra = {
        name.replace("blocks.1.", "blocks.2."): tensor + 1 for name, tensor in state.items() if "blocks.1." in name
    }
    torch.save(state | extra, files["vision"])
    loaded = load(files)
    assert loaded.config.vision_config.num_hidden_layers == 2
    assert_same_weights(loaded, whole)
    left_out = {key for key, file, _ in loaded.load_report.ignored if "eva_vit_g" in file}
    assert left_out == extra.keys()
    monkeypatch.setattr(match, "RELEASE_VISION_DEPTH", 39)
    assert load(files).config.vision_config.num_hidden_layers == 3, "of another depth, every block counts"


def test_split_layout_equals_transformers_own_phi(tmp_path, files, plain):
    """Weights carried by our converter into transformers' Phi give the logits of ours with the added norms off."""
    config = PhiConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
        partial_rotary_factor=0.5, resid_pdrop=0.0,
    )  # fmt: skip
    phi = PhiForCausalLM(config).eval()
    missing = phi.load_state_dict(language_state(plain, "split"), strict=False)
    assert not missing.unexpected_keys and all("rotary" in key for key in missing.missing_keys)
    plain_config = tiny_config(lora_rank=0)
    plain_config.text_config.qk_layernorm = plain_config.text_config.attention_rmsnorm = False
    plain_config.text_config.hidden_act = "gelu_new"
    ours = TinyGPTVForConditionalGeneration(plain_config).eval()
    wanted = {k: v for k, v in plain.items() if k in ours.state_dict()}
    ours.load_state_dict(wanted, strict=True)
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=ids).logits, phi(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize(("style", "prefix"), [("peft 0.2", "module."), ("peft new", ""), ("peft new", "module.")])
def test_peft_names_and_prefixes(tmp_path, files, plain, whole, style, prefix):
    torch.save({"model": {prefix + k: v for k, v in stage_state(plain, style).items()}}, tmp_path / "other.pth")
    assert_same_weights(load(files, checkpoint=tmp_path / "other.pth"), whole)


def test_files_of_old_torch_and_what_else_a_runner_saves(tmp_path, files, plain, whole):
    content = {"model": stage_state(plain), "optimizer": {"state": {}}, "config": {"run": {}}, "scaler": None}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_weights(load(files, checkpoint=tmp_path / "old.pth"), whole)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("a.pth", "optimizer.pth", "scheduler.pt", "rng_state_0.pth", "training_args.bin"), ["a.pth"]),
        (("optimizer.bin", "b.bin", "pytorch_model.bin", "a.pth"), ["pytorch_model.bin"]),
        (("a.safetensors", "b.safetensors", "pytorch_model.bin"), ["a.safetensors", "b.safetensors"]),
        (("b.pt", "a.pth"), ["a.pth"]),
    ],
)
def test_the_files_of_a_folder_that_hold_weights(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in weight_files._files(tmp_path)] == chosen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, files, plain, dtype):
    write_language(tmp_path / "half", plain, "split", dtype=dtype)
    loaded = load(files, language=tmp_path / "half")
    name = "language_model.layers.0.mlp.fc1.weight"
    assert loaded.state_dict()[name].dtype == torch.float32
    assert torch.equal(loaded.state_dict()[name], plain[name].to(dtype).float())


def test_a_model_in_half_precision_works_like_the_full_one(files, whole):
    half = load_release(**files, vision_heads=HEADS, qformer_heads=HEADS, dtype=torch.bfloat16)
    assert half.vision_encoder.vit.blocks[0].attn.qkv.weight.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert half.language_model.final_layernorm.weight.dtype == half.projector.linear_1.weight.dtype == torch.float32
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[half.config.image_token_id] * half.config.num_query_tokens, 2, 3]])
    with torch.no_grad():
        ours, wanted = (m(input_ids=ids, pixel_values=pixels).logits for m in (half, whole))
    assert (ours - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_fresh_start_without_stage_file(files):
    loaded = load({**files, "checkpoint": None})
    assert loaded.config.lora_rank == 0
    assert {name.split(".")[0] for name in loaded.load_report.fresh} == {"projector", "language_model"}


def test_what_is_fresh_starts_as_a_new_model_does(files):
    given = {**files, "checkpoint": None, "projection": None}
    release = match.match_release(**given, vision_heads=HEADS, qformer_heads=HEADS)
    fresh = dict(build_fresh(release, torch.bfloat16))
    norms = [name for name in fresh if "norm" in name and name.endswith("weight")]
    biases = [name for name in fresh if name.endswith("bias")]
    assert norms and biases and "projector.linear_1.weight" in fresh
    assert all((fresh[name] == 1).all() for name in norms) and not any(fresh[name].any() for name in biases)
    assert fresh["projector.linear_1.weight"].std() > 0 and {value.dtype for value in fresh.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        ([10], [["0"]]),
        ([15, 10], [["0", "1"]]),
        ([15, 11], [["0"], ["1"]]),
        ([30, 10, 10, 10], [["0"], ["1", "2"], ["3"]]),
        ([25, 12, 13, 1], [["0"], ["1", "2"], ["3"]]),
    ],
)
def test_shards_are_filled_up_to_their_bound_and_indexed(tmp_path, sizes, files):
    """Float32 tensors, 100 bytes a shard; a larger one is alone."""
    write_shards(tmp_path, ((str(n), torch.full((size,), float(n))) for n, size in enumerate(sizes)), 100)
    if len(files) == 1:
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert index["weight_map"] == {key: name for keys, name in zip(files, names, strict=True) for key in keys}
    assert index["metadata"] == {"total_size": 4 * sum(sizes)}
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    found = {key: tensor.load() for key, tensor in open_weights(tmp_path).items()}
    assert all((found[str(n)] == n).all() and len(found[str(n)]) == size for n, size in enumerate(sizes))


def test_minigpt4_projection_starts_the_first_layer(tmp_path, files, plain):
    weight = torch.randn(*plain["projector.linear_1.weight"].shape)
    torch.save({"model": {"llama_proj.weight": weight, "llama_proj.bias": torch.ones(len(weight))}}, tmp_path / "p.pth")
    loaded = load({**files, "checkpoint": None, "projection": tmp_path / "p.pth"})
    assert torch.equal(loaded.projector.linear_1.weight, weight)


def test_old_stage_four_file_with_qformer(tmp_path, files, plain):
    state = stage_state(plain)
    for name, tensor in plain.items():
        if name.startswith("qformer."):
            state[release_key(name, lora=True)[0]] = tensor + 1
    torch.save({"model": state, "epoch": 3}, tmp_path / "old.pth")
    loaded = load(files, checkpoint=tmp_path / "old.pth")
    assert torch.equal(loaded.qformer.query_tokens, plain["qformer.query_tokens"] + 1)


# ------------------------------------------------------------------ bad input: one sentence each


def bad(files, match, **changes):
    with pytest.raises(WeightFileError, match=match) as error:
        load(files, **changes)
    assert "\n" not in str(error.value)


def test_a_tensor_of_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"same": torch.ones(1), name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightFileError, match=r"same is in both .*a\.safetensors and .*b\.safetensors: keep one"):
        open_weights(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert {key: tensor.shape for key, tensor in open_weights(tmp_path).items()} == {"same": (1,), "a": (2,)}


def test_truncated_files(tmp_path, files):
    torch.save(torch.load(files["qformer"]), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for role, source in (
        ("vision", files["vision"]),
        ("language", files["language"] / "model.safetensors"),
        ("qformer", tmp_path / "old.pth"),
    ):
        cut = tmp_path / f"cut{source.suffix}"
        cut.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        bad(files, f"cut{source.suffix}.*(truncated|damaged|no complete safetensors)", **{role: cut})


def test_wrong_part_given(files):
    bad(files, "given as vision= but holds none of its tensors.*expected EVA ViT-g", vision=files["qformer"])
    bad(files, "given as language= but holds none", language=files["vision"])
    bad(files, "given as checkpoint=|no file supplies|holds none", checkpoint=files["vision"])


def test_13b_projection(tmp_path, files, plain):
    width = plain["projector.linear_1.weight"].shape[1]
    torch.save(
        {"model": {"llama_proj.weight": torch.zeros(5120, width), "llama_proj.bias": torch.zeros(5120)}},
        tmp_path / "13b.pth",
    )
    bad({**files, "checkpoint": None}, "MiniGPT-4 13B", projection=tmp_path / "13b.pth")


def test_missing_and_misshapen_tensors_are_named(tmp_path, files, plain):
    state = stage_state(plain)
    del state["llama_proj2.weight"]
    torch.save({"model": state}, tmp_path / "missing.pth")
    bad(files, "projector.linear_2.weight", checkpoint=tmp_path / "missing.pth")
    state = stage_state(plain) | {"llama_proj2.bias": torch.zeros(7)}
    torch.save({"model": state}, tmp_path / "shape.pth")
    bad(files, r"llama_proj2.bias of .*shape.pth is \[7\] but the model needs", checkpoint=tmp_path / "shape.pth")


def test_split_projection_without_its_third(tmp_path, files, plain):
    folder = tmp_path / "thirds"
    write_language(folder, plain, "split")
    state = language_state(plain, "split")
    del state["model.layers.1.self_attn.v_proj.weight"]
    save_file(state, folder / "model.safetensors")
    bad(files, "lacks v_proj", language=folder)


def test_other_models_empty_folders_and_pickles(tmp_path, files):
    torch.save({"bert.encoder.weight": torch.zeros(2)}, tmp_path / "bert.pth")
    bad(files, "holds none of its tensors", language=tmp_path / "bert.pth")
    (tmp_path / "empty").mkdir()
    bad(files, "holds no weight file", language=tmp_path / "empty")
    bad(files, "does not exist", vision=tmp_path / "nowhere.pth")
    (tmp_path / "zero.pth").touch()
    bad(files, "is an empty file", vision=tmp_path / "zero.pth")
    (tmp_path / "index").mkdir()
    (tmp_path / "index/model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    bad(files, "shards that are missing", language=tmp_path / "index")
    (tmp_path / "header.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    bad(files, "no complete safetensors", vision=tmp_path / "header.safetensors")


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.security
def test_a_pickle_never_runs_code(tmp_path, files, capsys):
    torch.save({"cls_token": Evil()}, tmp_path / "evil.pth")
    bad(files, "no file of tensors alone", vision=tmp_path / "evil.pth")
    assert "must not run" not in capsys.readouterr().out


def test_row_orders_are_inverse():
    rows = torch.arange(3 * 4 * 5).float()
    assert torch.equal(separate_heads(interleave_heads(rows, 4), 4), rows)
    assert interleave_heads(rows, 4)[:15].tolist() == [*range(5), *range(20, 25), *range(40, 45)]
