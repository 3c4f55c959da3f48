"""Low-bit layers of CPUs: their rounding, row by row."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.serving_model import make_model, make_processor
from tinygptv.checkpoint.folders import write_folder
from tinygptv.kernels.host_encoder import has_host_encoder
from tinygptv.quantization import linear_cpu
from tinygptv.quantization.artifact import load_artifact, write_artifact
from tinygptv.quantization.encoder_block import HostEncoderBlock
from tinygptv.quantization.linear_cpu import (
    HalfEmbedding,
    Int4Linear,
    Int8EncoderLinear,
    Int8Linear,
    round_groups,
    round_rows,
)
from tinygptv.quantization.torch_products import OnednnInt8


def make_linear(inputs=64, outputs=32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def test_each_row_has_a_scale_of_its_own():
    weight = torch.randn(8, 64)
    weight[3] *= 1000
    rounded, scale = round_rows(weight)
    assert rounded.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (8,)
    assert rounded.abs().amax(dim=1).tolist() == [127] * 8
    error = (rounded * scale[:, None] - weight).abs().amax(dim=1)
    assert (error <= scale / 2 * 1.001).all()
    torch.testing.assert_close(scale, weight.abs().amax(dim=1) / 127)


def test_a_row_of_zeros_stays_zero():
    rounded, scale = round_rows(torch.zeros(2, 4))
    assert not rounded.any() and torch.isfinite(scale).all() and (scale > 0).all()
    rounded, scale = round_rows(torch.tensor([[1e-30, -1e-30, 0.0]]))
    assert rounded.tolist() == [[127, -127, 0]] and scale.item() == pytest.approx(1e-30 / 127), "however small it is"


@pytest.mark.parametrize("bias", [True, False])
def test_one_large_row_does_not_coarsen_the_others(bias):
    linear = make_linear(bias=bias)
    with torch.no_grad():
        linear.weight[5] *= 1000
    layer = Int8Linear.restore(Int8Linear.pack(linear, "cpu"), "cpu", torch.float32)
    x = torch.randn(7, 64)
    error = (layer(x) - linear(x)).norm(dim=0) / linear(x).norm(dim=0)
    assert (error < 0.05).all(), "row 5 and the others alike"
    x[2] *= 1000  # one large token
    others = [row for row in range(32) if row != 5]
    error = (layer(x) - linear(x))[:, others].norm(dim=1) / linear(x)[:, others].norm(dim=1)
    assert (error < 0.05).all()


def test_a_token_of_zeros_gives_the_bias():
    linear = make_linear()
    layer = Int8Linear.restore(Int8Linear.pack(linear, "cpu"), "cpu", torch.float32)
    torch.testing.assert_close(layer(torch.zeros(1, 64))[0], linear.bias)
    assert layer(torch.zeros(2, 3, 64, dtype=torch.float16)).shape == (2, 3, 32)
    assert layer(torch.zeros(1, 64)).dtype == torch.float32
    assert repr(layer) == "Int8Linear(in_features=64, out_features=32, bias=True)"


HAS_ONEDNN = torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()


@pytest.mark.skipif(not HAS_ONEDNN, reason="needs AVX-512 VNNI and oneDNN")
@pytest.mark.parametrize("rows", [1, 5, 257])
@pytest.mark.parametrize("bias", [True, False])
def test_without_the_c_functions_onednn_gives_their_numbers_to_the_encoder(rows, bias, monkeypatch):
    stored = Int8Linear.pack(make_linear(96, 48, bias), "cpu")
    x = torch.randn(2, rows, 96) * torch.logspace(-3, 3, rows)[:, None]
    x[0, 0] = 0
    expected = Int8EncoderLinear.restore(stored, "cpu", torch.float32)(x)
    monkeypatch.setattr(linear_cpu, "has_host_linear", lambda *_: False)
    layer = Int8EncoderLinear.restore(stored, "cpu", torch.float32)
    assert type(layer.product) is OnednnInt8
    assert not isinstance(Int8Linear.restore(stored, "cpu", torch.float32).product, OnednnInt8)
    assert layer(x).shape == (2, rows, 48) and layer(x).dtype == torch.float32
    # A number that lies between two steps may be rounded to the other one.
    assert ((layer(x) - expected).norm(dim=-1) <= 2e-3 * expected.norm(dim=-1) + 1e-6).all()
    torch.testing.assert_close(layer(x[1:])[0], layer(x)[1], rtol=0, atol=0)


@pytest.mark.parametrize("has_host", [True, False])
def test_without_onednn_the_encoder_multiplies_as_the_language_model(has_host, monkeypatch):
    stored = Int8Linear.pack(make_linear(), "cpu")
    monkeypatch.setattr(linear_cpu, "has_onednn", lambda: False)
    if not has_host:
        monkeypatch.setattr(linear_cpu, "has_host_linear", lambda *_: False)
    layers = [kind.restore(stored, "cpu", torch.float32) for kind in (Int8Linear, Int8EncoderLinear)]
    assert type(layers[0].product) is type(layers[1].product)


def test_an_artifacts_encoder_has_the_kernels_for_many_rows(tmp_path):
    write_folder(tmp_path / "artifact", lambda folder: write_artifact(folder, make_model(), make_processor(), "cpu"))
    model, _, _ = load_artifact(tmp_path / "artifact")
    kinds = {part: {type(m) for m in getattr(model, part).modules()} for part in ("vision_encoder", "qformer")}
    assert Int8EncoderLinear in kinds["vision_encoder"] and Int8Linear not in kinds["vision_encoder"]
    assert HostEncoderBlock in kinds["vision_encoder"] or not has_host_encoder(16)
    assert Int8Linear in kinds["qformer"] and Int8EncoderLinear not in kinds["qformer"]


def test_four_bits_spread_from_the_smallest_to_the_largest_of_a_group():
    weight = torch.randn(16, 64) + 3
    numbers, scales = round_groups(weight, 32)
    assert numbers.dtype == torch.uint8 and int(numbers.max()) == 15 and int(numbers.min()) == 0
    assert scales.shape == (2, 16, 2) and scales.dtype == torch.bfloat16
    scale, offset = scales.float().transpose(0, 1).unbind(-1)
    back = (numbers.float().unflatten(1, (2, 32)) - 8) * scale[..., None] + offset[..., None]
    error = (back.flatten(1) - weight).abs().unflatten(1, (2, 32)).amax(dim=-1)
    assert (error < scale).all()


def test_4_bits_of_equal_and_of_very_small_weights():
    """Numbers of a group of one value are the middle one, 8; the smallest weights use all 16 numbers."""
    numbers, scales = round_groups(torch.full((1, 32), 0.5), 32)
    assert numbers.tolist() == [[8] * 32] and scales[0, 0, 1] == 0.5 and 0 < scales[0, 0, 0] < 1e-30
    numbers, _ = round_groups(torch.arange(16.0).repeat(1, 2) * 2.0**-60, 32)
    assert numbers.tolist() == [[*range(16)] * 2]
    far, scales = round_groups(torch.linspace(100.125, 100.25, 32)[None], 32)  # bfloat16 has 100 and 100.5 there
    assert far.tolist() == [[15] * 32] and scales[0, 0, 1] == 100, "cut off at the ends, not wrapped around"


@pytest.mark.parametrize(("inputs", "group"), [(128, 64), (96, 32)])
def test_the_largest_group_that_divides_the_input_is_taken(inputs, group):
    packed = Int4Linear.pack(make_linear(inputs), "cpu")
    assert packed["weight"].shape == (32, inputs // 2), "two numbers in a byte"
    assert packed["scale"].shape == (inputs // group, 32, 2)
    assert Int4Linear.restore(packed, "cpu", torch.float32).group == group


@pytest.mark.parametrize(("inputs", "outputs"), [(48, 32), (64, 24)])
def test_sizes_that_are_no_whole_blocks_are_refused(inputs, outputs):
    with pytest.raises(ValueError, match=f"a layer of {inputs} to {outputs} cannot have 4-bit weights"):
        Int4Linear.pack(make_linear(inputs, outputs), "cpu")


def test_the_embedding_is_stored_and_kept_in_16_bits(tmp_path):
    model = make_model()
    write_folder(tmp_path / "a", lambda folder: write_artifact(folder, model, make_processor(), "cpu"))
    stored = {name: t for path in (tmp_path / "a").glob("*.safetensors") for name, t in load_file(path).items()}
    table = stored["language_model.embed_tokens.weight"]
    assert table.dtype == torch.float16 and table.nbytes == 400 * 64 * 2
    assert stored["language_model.final_layernorm.weight"].dtype == torch.float32
    assert stored["language_model.layers.0.mlp.fc1.weight"].dtype == torch.int8
    loaded, _, metadata = load_artifact(tmp_path / "a")
    embedding = loaded.get_input_embeddings()
    assert isinstance(embedding, HalfEmbedding) and embedding.weight.dtype == torch.float16
    ids = torch.tensor([[0, 7, 399]])
    looked_up = embedding(ids)
    assert looked_up.dtype == torch.float32
    assert torch.equal(looked_up, model.get_input_embeddings()(ids).half().float())
    parts = metadata["parts"]
    assert parts["language_model"]["parameters"] == sum(p.numel() for p in model.language_model.parameters())
    assert metadata["bytes"] == sum(part["bytes"] for part in parts.values()) == sum(t.nbytes for t in stored.values())
