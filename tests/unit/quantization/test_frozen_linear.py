"""Frozen matrices in low bits beside adapters that train, which are trained as beside the unpacked matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.training_batches import loss_and_gradient, mixed_samples, relative, tiny_model
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.data.collate import collate
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.kernels.shapes import PackedWeight
from tinygptv.miniature.tiny import tiny_tokenizer
from tinygptv.quantization.frozen_linear import FrozenLinear, pack_frozen, unpack_frozen
from tinygptv.training.compilation import compile_layers
from tinygptv.training.stages import set_trainable

CPU = torch.device("cpu")
MATRICES = ["mlp.fc1", "mlp.fc2", "self_attn.dense.base_layer", "self_attn.qkv_proj.base_layer"]


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pair(request):
    """A model with packed matrices, and one with the full matrices that these stand for."""
    packed, full = tiny_model(), tiny_model()
    assert pack_frozen(packed, request.param, CPU) == 4 * len(packed.language_model.layers)
    for name, layer in packed.named_modules():
        if isinstance(layer, FrozenLinear):
            full.get_submodule(name).weight.data.copy_(layer.unpacked())
    return packed, full


def test_matrices_of_the_language_layers_are_packed_and_nothing_else(pair):
    packed, full = pair
    layers = packed.language_model.layers
    assert sorted(n for n, layer in layers[0].named_modules() if isinstance(layer, FrozenLinear)) == sorted(MATRICES)
    found, before = dict(packed.named_parameters()), dict(full.named_parameters())
    gone = {f"language_model.layers.{i}.{name}.weight" for i in range(len(layers)) for name in MATRICES}
    assert before.keys() - found.keys() == gone
    assert all(torch.equal(parameter, before[name]) for name, parameter in found.items())


@pytest.mark.parametrize("options", [{}, {"flat": True}, {"flat": True, "fused": True}, {"precision": "bf16"}])
def test_loss_and_gradient_are_those_of_the_unpacked_matrices(pair, options):
    packed, full = (loss_and_gradient(model, collate(mixed_samples(), 0), **options) for model in pair)
    assert packed[0] == pytest.approx(full[0], abs=1e-6)
    assert relative(packed[1], full[1]) < (1e-2 if options.get("precision") else 1e-6)


def layer_of(dtype=torch.float32):
    """Outputs and inputs of other sizes, and 8-bit codes."""
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (6, 16), dtype=torch.int8)
    return FrozenLinear(PackedWeight(codes, torch.rand(6, 1) / 64, None, None, 16, 16), torch.randn(6), dtype)


@pytest.mark.parametrize("bits", [32, 16])
def test_a_product_is_in_the_dtype_of_autocast_or_of_the_layer(bits):
    layer, x = layer_of(torch.bfloat16 if bits == 16 else torch.float32), torch.randn(2, 3, 16, requires_grad=True)
    output = layer(x)
    assert output.dtype == (torch.bfloat16 if bits == 16 else torch.float32) and output.shape == (2, 3, 6)
    output.float().sum().backward()
    torch.testing.assert_close(x.grad, layer.unpacked().float().sum(0).expand(2, 3, 16), atol=2e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16
    torch.testing.assert_close(layer(x.detach()[:0]).shape, torch.Size([0, 3, 6]))


def test_torch_knows_the_operations():
    """Shapes, gradients and what is kept, as its own checks of operators see them."""
    layer, x = layer_of(), torch.randn(4, 16, requires_grad=True)
    packed = layer.packed
    arguments = (x, layer.bias, packed.codes, packed.scale, None, None, packed.group, packed.inputs)
    torch.library.opcheck(torch.ops.tinygptv.frozen_product.default, arguments)


def test_a_compiled_layer_keeps_no_unpacked_matrix():
    """Between the passes nothing that is as large as a matrix in floating point exists."""
    model = tiny_model(text_config={**tiny_model().config.text_config.to_dict(), "num_hidden_layers": 1})
    pack_frozen(model, "nf4", CPU)
    compile_layers(model, backend="aot_eager_decomp_partition", fullgraph=True)
    matrices = {tuple(sorted(m.packed.shape)) for m in model.modules() if isinstance(m, FrozenLinear)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss_and_gradient(model, collate(mixed_samples(), 0), flat=True)
    assert any(tensor.dtype == torch.int32 and tensor.ndim == 2 for tensor in kept), "the packed ones"
    assert not [t.shape for t in kept if t.is_floating_point() and tuple(sorted(t.shape)) in matrices]


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_written_model_has_the_matrices_of_its_start(tmp_path, form, caplog):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    processor = TinyGPTVProcessor.from_config(model.config, tiny_tokenizer())
    save_checkpoint(tmp_path / "start", model, processor, {})
    pack_frozen(model, form, CPU)
    unpack_frozen(model, tmp_path / "start")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not caplog.text


def test_a_start_that_was_replaced_is_told_and_the_rounded_matrices_are_kept(tmp_path, caplog):
    model = tiny_model()
    pack_frozen(model, "int8", CPU)
    used = model.language_model.layers[0].mlp.fc1.unpacked()
    other = tiny_model()
    for parameter in other.parameters():
        parameter.data.neg_()
    save_checkpoint(tmp_path / "start", other, TinyGPTVProcessor.from_config(other.config, tiny_tokenizer()), {})
    unpack_frozen(model, tmp_path / "start")
    assert torch.equal(model.language_model.layers[0].mlp.fc1.weight, used)
    assert "layers.0.mlp.fc1.weight" in caplog.text and "has changed since training began" in caplog.text


def test_what_trains_is_not_packed():
    model = tiny_model()
    set_trainable(model, ("language_model", "lora"))
    assert pack_frozen(model, "int8", CPU) == 0
    assert type(model.language_model.layers[0].mlp.fc1) is nn.Linear
