"""A small model, and the files of a release with its weights."""

from __future__ import annotations

import pytest
import torch

from tests.release_files import HEADS, write_release
from tinygptv.convert.layouts import plain_key
from tinygptv.miniature.tiny import tiny_config
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=4)).eval()
    for parameter in model.parameters():  # every tensor different from its initial value
        parameter.data.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def plain(model):
    return {plain_key(name): tensor for name, tensor in model.state_dict().items()}


@pytest.fixture
def files(tmp_path, plain):
    return write_release(tmp_path, plain, HEADS)
