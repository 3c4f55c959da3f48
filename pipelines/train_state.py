"""Where a stage stands: the checkpoints taken while it runs, the per-step record, and the run's identity.

<output>/states/step-00000500/   training state: what trains, optimizer, position (tinygptv.checkpoint)
<output>/metrics.jsonl           one line per step; cut back to the state's step when a run goes on
<output>/run.json                MLflow run id, so that a resumed run continues the same one
<output>/checkpoint/             the whole model, at the end of the stage
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from tinygptv.checkpoint import CheckpointError, load_training_state, save_training_state
from tinygptv.train_step import TrainStep

logger = logging.getLogger(__name__)


class StateStore:
    """Training states of one run, newest last; saving happens in the background."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def newest(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest whole state: (next step, tensors, rest). Damaged ones are named in the log and passed over."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                tensors, extra = load_training_state(path)
            except (CheckpointError, OSError, ValueError, KeyError) as error:
                logger.warning("passing over a damaged training state: %s", error)
                continue
            return int(extra["next_step"]), tensors, extra
        return None

    def save(self, next_step: int, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        """Write a state without stalling the step: tensors are copied now and written in a thread."""
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._thread = threading.Thread(target=self._write, args=(next_step, copies, extra), name="state-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in progress; raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, next_step: int, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        try:
            save_training_state(self.folder / f"step-{next_step:08d}", tensors, {**extra, "next_step": next_step})
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
            for leftover in self.folder.glob(".*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
        except BaseException as error:
            self._error = error


def collect_state(step: TrainStep) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What must be saved: trainable parameters, AdamW's moments, the scaler."""
    names = {id(parameter): name for name, parameter in step.named}
    tensors: dict[str, torch.Tensor] = {f"parameter/{name}": parameter for name, parameter in step.named}
    for parameter, moments in step.optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer/{key}/{names[id(parameter)]}"] = value
    return tensors, {"scaler": step.scaler.state_dict()}


def restore_state(step: TrainStep, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
    """Put a collected state back.

    Raises:
        CheckpointError: the state is another model's or another stage's.
    """
    parameters = dict(step.named)
    stored = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if stored != set(parameters):
        odd = sorted(stored.symmetric_difference(parameters))
        raise CheckpointError(f"the training state is of another stage or model: {odd[0]} is in only one of them.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "parameter":
                parameters[rest].copy_(tensor)
            else:
                key, _, parameter_name = rest.partition("/")
                parameter = parameters[parameter_name]
                device = "cpu" if key == "step" and not parameter.is_cuda else parameter.device
                step.optimizer.state[parameter][key] = tensor.to(device)
    step.scaler.load_state_dict(extra["scaler"])


class StepRecord:
    """``metrics.jsonl``: one line per step, flushed with every training state."""

    def __init__(self, path: Path, next_step: int) -> None:
        """Open the record; lines of steps that will be done again are dropped.

        Args:
            path: the file.
            next_step: first step that will be written.
        """
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # half a line from a kill
                if entry["step"] < next_step:
                    kept.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in kept))
        self.first_loss = json.loads(kept[0])["loss"] if kept else None
        self.last_loss = json.loads(kept[-1])["loss"] if kept else None
        self._stream = path.open("a")

    def write(self, entry: dict[str, Any]) -> None:
        """Append a step."""
        if self.first_loss is None:
            self.first_loss = entry["loss"]
        self.last_loss = entry["loss"]
        self._stream.write(json.dumps(entry) + "\n")

    def flush(self) -> None:
        """Hand lines to the operating system."""
        self._stream.flush()

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()
