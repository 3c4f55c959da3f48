"""Tests that compare with the CPU in float32 need float32 convolutions: PyTorch's default on a card is TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def float32_convolutions() -> Iterator[None]:
    """Turn TF32 off during each test."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
