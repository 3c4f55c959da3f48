"""Optimizer: AdamW over what a stage trains, with the release's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tinygptv.training.schedule import Schedule


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed matrices and undecayed vectors (biases, norms), as released.

    Args:
        parameters: ``model.named_parameters()``; frozen ones are left out.
        weight_decay: decay of tensors with two or more dimensions.

    Returns:
        Groups for ``torch.optim.AdamW``, with the parameter names under ``names``.
    """
    trainable = [(name, p) for name, p in parameters if p.requires_grad]
    groups = []
    for decay, chosen in (
        (weight_decay, [(name, p) for name, p in trainable if p.ndim >= 2]),
        (0.0, [(name, p) for name, p in trainable if p.ndim < 2]),
    ):
        if chosen:
            groups.append({"params": [p for _, p in chosen], "names": [n for n, _ in chosen], "weight_decay": decay})
    return groups


def build_optimizer(model: nn.Module, schedule: Schedule, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters, at the schedule's first learning rate.

    Raises:
        ValueError: nothing is trainable.
    """
    groups = parameter_groups(model.named_parameters(), weight_decay)
    if not groups:
        raise ValueError("no parameter is trainable: choose the stage's trainable parts first.")
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=schedule.learning_rate(0), betas=(0.9, float(beta2)), fused=fused or None)
