"""Weights as they are stored: restored where training needs them unrounded, and handed on with the frozen encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinygptv.checkpoint.stored_weights import restore_rounded, stored_encoder, take_stored, unrounded_encoder
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.model.vision_encoder import interpolate_position_embedding

POSITIONS = "vision_encoder.vit.pos_embed"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float16, as the official weights of the encoder are, for images of 28 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start")
    TinyGPTVForConditionalGeneration(tiny_config()).half().save_pretrained(folder)
    return folder


@pytest.fixture
def model(start: Path) -> TinyGPTVForConditionalGeneration:
    """As a stage in bfloat16 loads it: all but the projector is frozen."""
    model = TinyGPTVForConditionalGeneration.from_pretrained(start, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("projector."))
    return model


def is_encoder(name: str) -> bool:
    return name.startswith(("vision_encoder.", "qformer."))


def test_the_encoder_is_read_by_name_in_its_stored_dtype_for_an_image_size(start):
    file = load_file(start / FILE)
    read = list(stored_encoder(str(start), 56))
    assert [name for name, _ in read] == sorted(filter(is_encoder, file)) and len(read) > 40
    for name, values in read:
        known = interpolate_position_embedding(file[name], 4).half() if name == POSITIONS else file[name]
        assert values.dtype == torch.float16 and torch.equal(values, known), name
    assert dict(read)[POSITIONS].shape == (1, 17, 32)
    assert torch.equal(dict(stored_encoder(start, 28))[POSITIONS], file[POSITIONS])


@pytest.mark.parametrize("size", [28, 56])
def test_what_left_the_dtype_it_was_loaded_in_is_rounded_once_at_most(start, model, size):
    model.set_image_size(size)
    known = load_file(start / FILE) | dict(stored_encoder(start, size))
    trained, frozen, kept = "lm_head.weight", "vision_encoder.vit.patch_embed.proj.weight", "qformer.query_tokens"
    parameters = dict(model.named_parameters())
    for name in (trained, POSITIONS):
        parameters[name].data = parameters[name].data.float()
    parameters[frozen].data = parameters[frozen].data.half()
    rounded = parameters[kept].clone()
    before = [parameters[name].clone() for name in (trained, POSITIONS, frozen)]
    restore_rounded(model, start, torch.bfloat16)
    for name, old in zip((trained, POSITIONS, frozen), before, strict=True):
        assert torch.equal(parameters[name].float(), known[name].float()) and not torch.equal(parameters[name], old)
        assert parameters[name].dtype == old.dtype
    assert torch.equal(parameters[kept], rounded) and parameters[kept].dtype == torch.bfloat16
    assert parameters[trained].grad_fn is None


def test_a_model_to_be_written_takes_what_is_stored_but_merged_and_wider_values(start, model, tmp_path):
    wide = "vision_encoder.vit.patch_embed.proj.weight"
    known = load_file(start / FILE)
    folder = changed(tmp_path, start, {wide: known[wide].float()})
    model.language_model.layers[0].mlp.fc1 = torch.nn.Sequential(model.language_model.layers[0].mlp.fc1)  # another name
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    take_stored(model, folder)
    for name, parameter in model.named_parameters():
        stays = name == wide or ".fc1.0." in name or before[name].dtype == torch.float32
        expected = before[name] if stays else known[name]
        assert parameter.dtype == expected.dtype and torch.equal(parameter, expected), name
    assert any(p.dtype == torch.float16 for p in model.parameters())


def test_a_model_that_was_loaded_in_float32_has_its_values(model):
    restore_rounded(model, "nowhere", torch.float32)


@pytest.mark.parametrize(("size", "places"), [(28, 5), (56, 17)])
def test_what_is_frozen_is_handed_on_without_the_rounding_of_training(start, model, size, places):
    model.set_image_size(size)
    known = dict(stored_encoder(start, size))
    found = unrounded_encoder(model, start)
    assert found.keys() == known.keys() and found[POSITIONS].shape == (1, places, 32)
    assert all(torch.equal(found[name], known[name]) and found[name].dtype == torch.float16 for name in known)
    own = model.state_dict()
    assert any(not torch.equal(found[name].float(), own[name].float()) for name in known), "nothing was rounded"


def test_what_trains_is_the_models_own(start, model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("qformer." in name)
    found = unrounded_encoder(model, start)
    assert found and not any(name.startswith("qformer.") for name in found)


def changed(folder: Path, start: Path, change: dict[str, Tensor]) -> Path:
    for file in start.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file({**load_file(start / FILE), **change}, folder / FILE)
    return folder


def test_a_start_that_was_replaced_while_training_is_not_written(start, model, tmp_path, caplog):
    name = "qformer.query_tokens"
    values = load_file(start / FILE)[name]
    largest = values.abs().max()
    assert unrounded_encoder(model, changed(tmp_path, start, {name: values + largest * 2**-9}))
    assert not caplog.text
    for other in (values + largest * 2**-5, values - largest * 2**-5, values[:, :1], values * float("nan")):
        caplog.clear()
        assert unrounded_encoder(model, changed(tmp_path, start, {name: other.contiguous()})) == {}
        assert f"{name} of {tmp_path} has changed since training began" in caplog.text
