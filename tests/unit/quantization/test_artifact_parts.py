"""Parts of an artifact without a model: which module is stored how, and what a file gives back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tinygptv.checkpoint.folders import CheckpointError
from tinygptv.quantization import artifact
from tinygptv.quantization.artifact import (
    FORMATS,
    METHODS,
    PACKED,
    SHARD_BYTES,
    Method,
    _check_shape,
    _formats,
    _in_memory,
    _rounded,
    _shards,
    _split,
    _StoredTensors,
    compute_dtype,
    format_class,
    is_packed,
    load_artifact,
)
from tinygptv.quantization.linear_bnb import LLMInt8Linear, NF4Linear
from tinygptv.quantization.linear_cpu import Int4Linear, Int8Linear


def test_methods_and_formats_are_those_of_the_files_that_are_about():
    """Artifacts name them: another meaning would make those unreadable."""
    methods = {
        "nf4": Method("nf4", "half", "half", "half", "full"),
        "int4": Method("int4", "half", "half", "half", "full"),
        "int8": Method("int8", "half", "half", "half", "full"),
        "cpu": Method("int8", "int8", "int8", "int8", "full"),
        "cpu4": Method("int4", "int8", "int8", "int8", "full"),
    }
    assert methods == METHODS
    kinds = {"int8": Int8Linear, "int4": Int4Linear, "nf4": NF4Linear, "llm_int8": LLMInt8Linear}
    assert {name: format_class(name) for name in FORMATS} == kinds and PACKED.keys() == kinds.keys()
    assert SHARD_BYTES == 2**28, "docs/quantization.md counts on small files"


@pytest.mark.parametrize(("encoder", "format"), [("", "int8"), ("half", "half"), ("int8", "int8")])
def test_another_format_is_the_image_encoders_alone(encoder, format):
    method = METHODS["cpu4"]
    assert _formats(method, encoder) == {
        "language_model": "int4", "lm_head": "int8", "vision_encoder": format, "qformer": format, "projector": "full",
    }  # fmt: skip
    assert method == METHODS["cpu4"] and method.vision_encoder == "int8", "the method stays as it is"


class Special(nn.Linear):
    """A linear layer with a forward of its own."""


@pytest.mark.parametrize(
    ("name", "module", "packed"),
    [
        ("language_model.layers.0.mlp.fc1", nn.Linear(2, 2), True),
        ("lm_head", nn.Linear(2, 2), True),
        ("language_model.layers.0.dense.lora_A.default", nn.Linear(2, 2), False),
        ("language_model.layers.0.mlp.fc1", Special(2, 2), False),
        ("language_model.embed_tokens", nn.Embedding(2, 2), False),
        ("qformer.x", nn.Linear(2, 2), False),
        ("projector.linear_1", nn.Linear(2, 2), False),
        ("other.x", nn.Linear(2, 2), False),
    ],
)
def test_plain_linear_layers_of_low_bit_parts_are_packed(name, module, packed):
    formats = {"language_model": "nf4", "lm_head": "int8", "qformer": "half", "projector": "full"}
    assert is_packed(name, module, formats) is packed


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("language_model.embed_tokens.weight", torch.float16),
        ("language_model.layers.0.x", torch.float32),
        ("qformer.x", torch.float16),
        ("projector.x", torch.float32),
    ],
)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_what_is_not_packed_has_16_or_32_bits(name, dtype, given):
    formats = {"language_model": "int8", "qformer": "half", "projector": "full"}
    tensor = torch.tensor([1.5, -65504.0]).to(given)[:1]
    found = _rounded(name, tensor, formats)
    assert found.dtype == dtype and found.tolist() == [1.5]
    for bad in (70_000.0, float("inf"), float("nan")):
        if dtype == torch.float32:
            _rounded(name, torch.tensor([bad]), formats)
            continue
        with pytest.raises(ValueError) as caught:
            _rounded(name, torch.tensor([1.0, bad]), formats)
        told = f"{name} has values beyond float16's range: it cannot be stored in half precision."
        assert str(caught.value) == told


def test_a_tensor_that_is_a_window_gets_memory_of_its_own():
    numbers = torch.arange(6.0)
    for window in (numbers[:3], numbers[3:], numbers.view(2, 3).T, numbers[::2]):
        found = _in_memory(window)
        assert torch.equal(found, window) and found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.nbytes
    whole = nn.Parameter(torch.ones(2))
    found = _in_memory(whole)
    assert found.data_ptr() == whole.data_ptr() and not found.requires_grad, "what has its own is not copied"


def test_modules_are_never_divided_and_every_byte_counts(monkeypatch):
    monkeypatch.setattr(artifact, "SHARD_BYTES", 12)
    two = {"a.w": torch.zeros(2), "a.b": torch.zeros(1, dtype=torch.float16)}  # 10 bytes
    modules = [two, {"b": torch.zeros(1, dtype=torch.float16)}, {"c": torch.zeros(4)}, {"d": torch.zeros(1)}]
    assert [list(shard) for shard in _shards(modules)] == [["a.w", "a.b", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.b.weight", ("a.b", "weight")),
        ("a.b.weight.absmax", ("a.b", "weight.absmax")),
        ("a.weight.quant_state.bitsandbytes__nf4", ("a", "weight.quant_state.bitsandbytes__nf4")),
        ("a.b.scale", ("a.b", "scale")),
        ("a.lora_A.default.weight", ("a.lora_A.default", "weight")),
        ("query_tokens", ("", "query_tokens")),
    ],
)
def test_statistics_of_a_weight_belong_to_its_module(name, parts):
    assert _split(name) == parts


def test_modules_are_taken_once_from_whichever_file_holds_them(tmp_path):
    save_file(
        {"a.weight": torch.tensor([1.0]), "b.c.weight": torch.tensor([2.0])}, tmp_path / "model-00000.safetensors"
    )
    save_file({"a.bias": torch.tensor([3.0]), "a.weight.x": torch.tensor([4.0])}, tmp_path / "model-00001.safetensors")
    save_file({"z.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    stored = _StoredTensors(tmp_path)
    assert stored.folder == tmp_path and stored.left == ["a", "b.c"]
    found = stored.take("a")
    assert {leaf: t.tolist() for leaf, t in found.items()} == {"weight": [1], "bias": [3], "weight.x": [4]}
    assert stored.take("a") == stored.take("none") == {} and stored.left == ["b.c"]
    found["weight"] += 1  # of its own, not of the mapped file
    assert _StoredTensors(tmp_path).take("a")["weight"].tolist() == [1]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "is an empty file"), (b"<html>", "is a web page"), (b"\xff" * 64, "is no complete safetensors file: ")],
)
def test_a_file_that_holds_no_tensors_is_named(tmp_path, content, told):
    path = tmp_path / "model-00000.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        _StoredTensors(tmp_path)
    assert str(caught.value).startswith(f"{path} {told}")


def test_a_shape_is_compared_where_the_model_has_one(tmp_path):
    _check_shape(tmp_path, "a", torch.zeros(2, 3), torch.zeros(2, 3))
    _check_shape(tmp_path, "a", torch.zeros(2, 3), None)
    with pytest.raises(CheckpointError) as caught:
        _check_shape(tmp_path, "a.b", torch.zeros(3, 2), torch.zeros(2, 3))
    assert str(caught.value) == f"a.b in {tmp_path} has the shape [3, 2], but its config.json needs [2, 3]."


def test_bfloat16_counts_where_a_gpu_has_it_itself(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: asked.append(including_emulation) or False
    )
    assert compute_dtype(torch.device("cuda")) == torch.float16 and asked == [False]
    assert compute_dtype(torch.device("meta")) == torch.bfloat16 and len(asked) == 1


@pytest.mark.parametrize("verify", [True, False])
def test_an_artifact_is_verified_first_and_read_without_the_network(tmp_path, monkeypatch, verify):
    asked = []
    frozen = SimpleNamespace(requires_grad_=lambda grad: asked.append(("grad", grad)) or "the model")
    model = SimpleNamespace(eval=lambda: asked.append("eval") or frozen)
    parts = {"lm_head": {"format": "int8"}, "projector": {"format": "full"}}
    metadata = {"parts": parts}
    monkeypatch.setattr(artifact, "verify_folder", lambda folder: asked.append(("verify", folder)))
    monkeypatch.setattr(artifact, "read_metadata", lambda folder: asked.append("metadata") or metadata)
    monkeypatch.setattr(artifact, "read_config", lambda folder: "config")
    monkeypatch.setattr(artifact, "build_on_meta", lambda config: {"config": model}[config])
    monkeypatch.setattr(artifact, "_fill", lambda model, stored, formats, device: asked.append((formats, device)))
    monkeypatch.setattr(artifact, "load_processor", lambda folder: ("processor of", folder))
    monkeypatch.setattr(artifact.GenerationConfig, "from_pretrained", lambda folder, **how: (folder, how))
    (tmp_path / "generation_config.json").touch()
    found = load_artifact(str(tmp_path), "meta", verify=verify)
    assert found == ("the model", ("processor of", tmp_path), metadata)
    assert asked[: verify + 1] == [("verify", tmp_path)] * verify + ["metadata"]
    formats = {"lm_head": "int8", "projector": "full"}
    assert asked[verify + 1 :] == [(formats, torch.device("meta")), "eval", ("grad", False)]
    assert model.generation_config == (tmp_path, {"local_files_only": True})
