"""Guard: finds losses and gradients that are not finite, loss spikes and vanishing gradients.

Measurements stay on the device: each step's loss is compared with the running mean and deviation of the losses before
it, and a loss that fails is rejected there, before the update. The host reads the verdicts of many steps at once, at
the steps where the loop reads losses anyway. Only after a fault is a step examined (``diagnose``): its samples are
computed again one by one, to name those that cause it and the first layer with a bad value.

All workers see the same summed loss and gradient, so all reach the same verdict without communication.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinygptv.data.collate import MicroBatch
from tinygptv.training.train_step import StepResult, TrainStep

_MEMORY = 0.05
"""Weight of the newest loss in the running mean and deviation: about the last 20 steps count."""

_SETTLING_STEPS = 20
"""Steps before spikes are looked for: the first losses fall too fast to have a deviation."""

_MIN_DEVIATION = 0.02
"""A spike is no smaller than this share of the mean, however calm the losses before it were."""

_NAMED_SAMPLES = 8

FaultKind = Literal["nonfinite_loss", "nonfinite_gradient", "spike", "vanishing_gradient"]


class TrainingStopped(ValueError):
    """Training cannot continue: the text names the step, the fault, the first bad layer and the samples."""


@dataclass(frozen=True)
class Fault:
    """A bad optimizer step.

    Attributes:
        step: 0-based.
        kind: what is wrong.
        loss: of the step.
        grad_norm: of the step.
        part: part of the model whose gradient vanishes; empty for the other kinds.
    """

    step: int
    kind: FaultKind
    loss: float
    grad_norm: float
    part: str = ""


@dataclass
class Diagnosis:
    """Where a fault comes from.

    Attributes:
        layer: the first module, in the order of the computation, with a value that is not finite; empty for none.
        where: the pass in which it was found; empty for none.
        samples: ids of the samples that cause it, worst first.
    """

    layer: str = ""
    where: Literal["", "forward", "backward"] = ""
    samples: list[str] = field(default_factory=list)

    @staticmethod
    def merge(found: Sequence[Diagnosis]) -> Diagnosis:
        """The diagnoses of several workers as one: the first worker with a bad layer names it."""
        first = next((each for each in found if each.layer), found[0])
        samples = [name for group in zip_longest(*(each.samples for each in found)) for name in group if name]
        return Diagnosis(first.layer, first.where, samples[:_NAMED_SAMPLES])


def describe(fault: Fault, diagnosis: Diagnosis) -> str:
    """A fault and its diagnosis in one sentence."""
    text = f"step {fault.step}: {_WORDS[fault.kind]} (loss {fault.loss:.4g}, gradient norm {fault.grad_norm:.4g})"
    if fault.part:
        text += f", first in {fault.part}"
    if diagnosis.layer:
        text += f", first in the {diagnosis.where} of {diagnosis.layer}"
    if diagnosis.samples:
        text += f"; samples {', '.join(diagnosis.samples)}"
    return text


_WORDS: dict[FaultKind, str] = {
    "nonfinite_loss": "the loss is not finite",
    "nonfinite_gradient": "the gradient is not finite",
    "spike": "the loss jumps",
    "vanishing_gradient": "a gradient vanishes",
}


class Guard:
    """Judges the steps of one worker."""

    def __init__(self, *, spike: float, vanishing: float, patience: int, device: torch.device) -> None:
        """Prepare.

        Args:
            spike: loss-spike threshold in standard deviations above the running mean; 0 disables.
            vanishing: a part's gradient norm below this is vanishing; 0 disables.
            patience: faulty steps in a row, and readings in a row of a vanishing gradient, that count as a fault.
            device: of the losses.
        """
        self.spike, self.vanishing, self.patience = spike, vanishing, patience
        self.statistics = torch.zeros(3, dtype=torch.float64, device=device)  # mean, variance, losses seen
        self.faults_in_a_row = 0
        self._waiting: list[tuple[int, StepResult]] = []
        self._vanishing: dict[str, deque[float]] = {}

    def reject(self, loss: Tensor) -> Tensor:
        """Whether a step must be left out (bool scalar); called by ``TrainStep``. Nothing is read from the device.

        A spike enters the running mean clipped to the threshold, so that a lasting change of the losses is accepted
        after some steps. A loss that is not finite leaves the statistics as they are.
        """
        mean, variance, seen = self.statistics.unbind()
        limit = mean + self.spike * torch.maximum(variance.sqrt(), mean.abs() * _MIN_DEVIATION)
        settled = seen >= _SETTLING_STEPS
        finite = torch.isfinite(loss)
        spiked = settled & (loss > limit) if self.spike else torch.zeros_like(settled)
        counted = torch.where(spiked, limit, loss)
        memory = torch.clamp(1.0 / (seen + 1.0), min=_MEMORY)
        change = counted - mean
        moved = torch.stack(
            [mean + memory * change, (1.0 - memory) * (variance + memory * change.square()), seen + 1.0]
        )
        self.statistics = torch.where(finite, moved, self.statistics)
        return ~finite | spiked

    def watch(self, step: int, result: StepResult) -> None:
        """Take a finished step; nothing is read from the device."""
        self._waiting.append((step, result))

    def check(self, train_step: TrainStep, part_norms: dict[str, float] | None = None) -> list[Fault]:
        """Read the verdicts of the steps since the last call; all workers must call it at the same steps.

        Args:
            train_step: for the state of its gradient scaler.
            part_norms: gradient norms of the newest step, where they were read.

        Returns:
            The faults, oldest first.
        """
        if not self._waiting:
            return []
        rows = [torch.stack([r.loss, r.grad_norm.double(), r.rejected.double()]) for _, r in self._waiting]
        values = torch.stack(rows).tolist()
        faults = []
        for (step, _), (loss, grad_norm, rejected) in zip(self._waiting, values, strict=True):
            kind = _kind(loss, grad_norm, bool(rejected), _searches_scale(train_step))
            self.faults_in_a_row = self.faults_in_a_row + 1 if kind else 0
            if kind:
                faults.append(Fault(step, kind, loss, grad_norm))
        newest, loss, grad_norm = self._waiting[-1][0], values[-1][0], values[-1][1]
        self._waiting.clear()
        if part_norms and self.vanishing and not faults:
            faults += [
                Fault(newest, "vanishing_gradient", loss, grad_norm, part)
                for part in self._vanished_parts(part_norms)[:1]
            ]
        return faults

    def _vanished_parts(self, part_norms: dict[str, float]) -> list[str]:
        """Parts whose gradient has been vanishing for ``patience`` readings, named once each; deepest layer first."""
        lost = []
        for part, norm in part_norms.items():
            seen = self._vanishing.setdefault(part, deque(maxlen=self.patience))
            seen.append(norm)
            if len(seen) == self.patience and max(seen) < self.vanishing:
                lost.append(part)
                seen.clear()
        return sorted(lost, key=lambda part: (-_depth(part), part))

    def state(self) -> dict[str, Tensor]:
        """State of the guard, so that a resumed run judges as an uninterrupted one does."""
        return {"statistics": self.statistics}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` gave; without it the statistics start again."""
        self.statistics = state.get("statistics", torch.zeros_like(self.statistics)).to(self.statistics.device)
        self._waiting.clear()


def _kind(loss: float, grad_norm: float, rejected: bool, searches_scale: bool) -> FaultKind | None:
    if not math.isfinite(loss):
        return "nonfinite_loss"
    if rejected:
        return "spike"
    if not math.isfinite(grad_norm) and not searches_scale:
        return "nonfinite_gradient"
    return None


def _searches_scale(train_step: TrainStep) -> bool:
    """Whether an infinite gradient only means that the fp16 scaler is lowering its scale."""
    return train_step.scaler.is_enabled() and train_step.scaler.get_scale() >= 1.0


def _depth(part: str) -> int:
    return int(part.rsplit("_", 1)[1]) if "/layer_" in part else -1


# ---------------------------------------------------------------------- diagnosis


def diagnose(train_step: TrainStep, samples: Sequence[tuple[str, MicroBatch]], *, spike: bool) -> Diagnosis:
    """Find the samples of a step that cause a fault, and the first layer with a bad value; weights stay as they are.

    Args:
        train_step: of the worker; its gradient buffer is used and left empty.
        samples: id and batch of each sample of the step, alone.
        spike: look for the largest losses instead of values that are not finite.

    Returns:
        The diagnosis; empty where each sample alone is finite.
    """
    found = Diagnosis()
    losses: dict[str, float] = {}
    for name, batch in samples:
        train_step.gradient.zero_()
        with train_step.as_written(), _probe(train_step.model) as probe:
            token_losses = train_step.forward(batch)
            forward = probe.first()
            losses[name] = float(token_losses.detach().mean()) if len(token_losses) else 0.0
            backward = ""
            if not spike and not forward and len(token_losses):
                train_step.scaler.scale(token_losses.sum()).backward()
                backward = probe.first_of_gradients() or _bad_parameter(train_step)
        if not spike and (forward or backward):
            found.samples.append(name)
            if not found.layer:
                found.layer, found.where = forward or backward, "forward" if forward else "backward"
    train_step.gradient.zero_()
    if spike:
        found.samples = sorted(losses, key=lambda name: -losses[name])
    found.samples = found.samples[:_NAMED_SAMPLES]
    return found


class _Probe:
    """Whether the outputs of every leaf module, and their gradients, are finite in one pass, in order."""

    def __init__(self) -> None:
        self.outputs: list[tuple[str, Tensor]] = []
        self.gradients: list[tuple[str, Tensor]] = []

    def first(self) -> str:
        """First module whose output is not finite; empty for none."""
        return next((name for name, finite in self.outputs if not finite), "")

    def first_of_gradients(self) -> str:
        """First module, from the loss backwards, whose output's gradient is not finite; empty for none."""
        return next((name for name, finite in self.gradients if not finite), "")


@contextmanager
def _probe(model: nn.Module) -> Iterator[_Probe]:
    """Observe the outputs of all leaf modules while the block runs."""
    probe = _Probe()

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            probe.outputs.append((name, torch.isfinite(output.detach()).all()))
            if output.requires_grad:
                output.register_hook(lambda gradient: probe.gradients.append((name, torch.isfinite(gradient).all())))

        return hook

    hooks = [
        module.register_forward_hook(hook_of(name))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        yield probe
    finally:
        for hook in hooks:
            hook.remove()


def _bad_parameter(train_step: TrainStep) -> str:
    """First trainable parameter whose gradient is not finite; empty for none."""
    bad = (name for name, p in train_step.named if p.grad is not None and not torch.isfinite(p.grad).all())
    return next(bad, "")
