"""The loop that pretrains the miniature's backbones: resumable, seeded, with a cosine schedule. Knows no task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tinygptv.checkpoint.checkpoint import load_training_state, save_training_state
from tinygptv.checkpoint.folders import CheckpointError

SAVE_EVERY_S = 60.0

Report = Callable[[int, dict[str, float]], None]
"""Called with (step, numbers) now and then."""


class PretrainingTask(Protocol):
    """Interface of a pretraining task."""

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
    cycles: Sequence[int],
    peak_learning_rate: float,
    state_dir: Path,
    weight_decay: float = 0.01,
    orthogonalized: str = "",
    warmup_steps: int = 100,
    report: Report | None = None,
    report_every: int = 50,
    evaluate_every: int = 2000,
) -> dict[str, float]:
    """Train a task's module, resuming from ``state_dir`` where an earlier run stopped.

    Args:
        task: what is learned.
        cycles: steps of each cycle of the schedule; in each the learning rate ends at a fiftieth of its peak.
        peak_learning_rate: after the warm-up.
        state_dir: where the state is kept.
        weight_decay: decay of matrices.
        orthogonalized: matrices with this in their names are trained by Muon, at twice the rate; all else by AdamW.
        warmup_steps: linear warm-up of each cycle.
        report: receives losses and scores.
        report_every: steps between reports.
        evaluate_every: steps between evaluations.

    Returns:
        The last evaluation.
    """
    parameters = dict(task.module.named_parameters())
    optimizers = _optimizers(parameters, orthogonalized, peak_learning_rate, weight_decay)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    start = _restore(state_dir, parameters, optimizers)
    num_steps = sum(cycles)
    saved_at = time.monotonic()
    scores: dict[str, float] = {}
    task.module.train()
    for step in range(start, num_steps):
        share = _share_of_peak(step, cycles, warmup_steps)
        for group, peak in groups:
            group["lr"] = peak * share
        losses = task.losses(step)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if report and (step % report_every == 0 or step + 1 == num_steps):
            report(step, {name: float(loss.detach()) for name, loss in losses.items()})
        if (step + 1) % evaluate_every == 0 or step + 1 == num_steps:
            scores = _evaluate(task)
            if report:
                report(step, scores)
        if time.monotonic() - saved_at > SAVE_EVERY_S or step + 1 == num_steps:
            _save(state_dir, step + 1, parameters, optimizers)
            saved_at = time.monotonic()
    return scores or _evaluate(task)


def _evaluate(task: PretrainingTask) -> dict[str, float]:
    task.module.eval()
    with torch.inference_mode():
        scores = task.evaluate()
    task.module.train()
    return {f"held_out/{name}": value for name, value in scores.items()}


def _optimizers(
    parameters: dict[str, nn.Parameter], orthogonalized: str, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (with updates of AdamW's size) where some matrices are to be orthogonalized."""
    matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and orthogonalized and orthogonalized in name}
    rest = [p for name, p in parameters.items() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices.values(), lr=2 * learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def _share_of_peak(step: int, cycles: Sequence[int], warmup_steps: int) -> float:
    for num_steps in cycles:
        if step < num_steps:
            break
        step -= num_steps
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def _save(
    state_dir: Path, next_step: int, parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> None:
    names = {id(p): name for name, p in parameters.items()}
    tensors: dict[str, Tensor] = {f"parameter/{name}": p for name, p in parameters.items()}
    for optimizer in optimizers:
        for parameter, moments in optimizer.state.items():
            tensors |= {f"{key}/{names[id(parameter)]}": value for key, value in moments.items()}
    save_training_state(state_dir, tensors, {"next_step": next_step})


def _restore(state_dir: Path, parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> int:
    try:
        tensors, extra = load_training_state(state_dir)
    except CheckpointError:
        return 0
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, tensor in tensors.items():
            kind, _, parameter_name = name.partition("/")
            parameter = parameters[parameter_name]
            if kind == "parameter":
                parameter.copy_(tensor)
            else:
                owners[id(parameter)].state[parameter][kind] = tensor
    return int(extra["next_step"])
