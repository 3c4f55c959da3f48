"""The loop that pretrains the miniature's backbones: resumable, seeded, with a cosine schedule. Knows no task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tinygptv.checkpoint import CheckpointError, load_training_state, save_training_state

SAVE_EVERY_S = 60.0

Report = Callable[[int, dict[str, float]], None]
"""Called with (step, numbers) now and then."""


class PretrainingTask(Protocol):
    """What the loop needs of a task."""

    @property
    def module(self) -> nn.Module:
        """Everything that trains, throw-away heads included."""

    def losses(self, step: int) -> dict[str, Tensor]:
        """Losses of one batch, drawn from the step's own generator; their sum is minimised."""

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out scenes."""


def pretrain(
    task: PretrainingTask,
    *,
    num_steps: int,
    peak_learning_rate: float,
    state_dir: Path,
    weight_decay: float = 0.01,
    warmup_steps: int = 200,
    report: Report | None = None,
    report_every: int = 50,
    evaluate_every: int = 2000,
) -> dict[str, float]:
    """Train a task's module, going on from ``state_dir`` where an earlier run stopped.

    Args:
        task: what is learned.
        num_steps: steps of the whole training; the learning rate ends at a fiftieth of its peak.
        peak_learning_rate: after the warm-up.
        state_dir: where the state is kept.
        weight_decay: AdamW decay of matrices.
        warmup_steps: linear warm-up.
        report: receives losses and scores.
        report_every: steps between reports.
        evaluate_every: steps between evaluations.

    Returns:
        The last evaluation.
    """
    parameters = dict(task.module.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak_learning_rate, betas=(0.9, 0.98))
    start = _restore(state_dir, parameters, optimizer)
    saved_at = time.monotonic()
    scores: dict[str, float] = {}
    task.module.train()
    for step in range(start, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, num_steps, warmup_steps, peak_learning_rate)
        losses = task.losses(step)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report and (step % report_every == 0 or step + 1 == num_steps):
            report(step, {name: float(loss.detach()) for name, loss in losses.items()})
        if (step + 1) % evaluate_every == 0 or step + 1 == num_steps:
            scores = _evaluate(task)
            if report:
                report(step, scores)
        if time.monotonic() - saved_at > SAVE_EVERY_S or step + 1 == num_steps:
            _save(state_dir, step + 1, parameters, optimizer)
            saved_at = time.monotonic()
    return scores or _evaluate(task)


def _evaluate(task: PretrainingTask) -> dict[str, float]:
    task.module.eval()
    with torch.inference_mode():
        scores = task.evaluate()
    task.module.train()
    return {f"held_out/{name}": value for name, value in scores.items()}


def _learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _save(state_dir: Path, next_step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    names = {id(p): name for name, p in parameters.items()}
    tensors: dict[str, Tensor] = {f"parameter/{name}": p for name, p in parameters.items()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"{key}/{names[id(parameter)]}": value for key, value in moments.items()}
    save_training_state(state_dir, tensors, {"next_step": next_step})


def _restore(state_dir: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> int:
    try:
        tensors, extra = load_training_state(state_dir)
    except CheckpointError:
        return 0
    with torch.no_grad():
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition("/")
            if kind == "parameter":
                parameters[parameter].copy_(tensor)
            else:
                optimizer.state[parameters[parameter]][kind] = tensor
    return int(extra["next_step"])
