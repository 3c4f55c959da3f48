"""Training states: the checkpoints taken while a stage runs, to resume from.

<storage>/states/step-00000500/   trainable parameters, optimizer, position (tinygptv.checkpoint.checkpoint)
<storage>/checkpoint/             the whole model, at the end of the stage
<storage>/metrics.jsonl           one line per step; cut back to the state's step when a run resumes
<output>/run.json                 identity of the tracker's run, which a resumed stage continues

``storage`` is ``output``, or ``storage_path`` where that is given: a folder or URI that all nodes reach.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import threading
from pathlib import Path
from typing import Any, cast

import torch

from pipelines import storage
from pipelines.training.held_out_record import HeldOutState
from tinygptv.checkpoint.checkpoint import load_training_state, save_training_state
from tinygptv.checkpoint.folders import MANIFEST, CheckpointError
from tinygptv.training.train_step import TrainStep

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"step-(\d{8})$")


class StateRecord(HeldOutState, total=False):
    """``state.json``: what a training state keeps beside its tensors.

    Attributes:
        next_step: from which the run continues.
        scaler: state of the GradScaler.
        mean_loss: mean loss of the steps since the state before; None where it is not finite.
        cut: samples that were longer than the stage's limits, by source: fields of ``CutCount``.
    """

    next_step: int
    scaler: dict[str, Any]
    mean_loss: float | None
    cut: dict[str, dict[str, int]]


State = tuple[int, dict[str, torch.Tensor], StateRecord]
"""Next step, tensors, and ``state.json``."""


class StateStore:
    """Training states of one run in a folder or URI; they are written in the background."""

    def __init__(self, location: str, keep: int, *, keep_best: bool = False) -> None:
        """Open.

        Args:
            location: folder or URI; need not exist.
            keep: number of newest states to keep.
            keep_best: also keep the state with the least ``held_out_loss``; without one, with the least ``mean_loss``.
        """
        self.location = location
        self.keep = keep
        self.keep_best = keep_best
        self.whole_step = 0  # of the newest state that this process has written whole
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def folder(self, next_step: int) -> str:
        """Location of the state from which step ``next_step`` continues."""
        return storage.join(self.location, f"step-{next_step:08d}")

    def newest_step(self) -> int:
        """Step of the newest complete state, without reading it; 0 where there is none."""
        complete = (step for step, folder in self._folders() if storage.exists(storage.join(folder, MANIFEST)))
        return max(complete, default=0)

    def newest(self) -> State | None:
        """The newest complete state; damaged ones are named in the log and skipped."""
        for _, folder in reversed(self._folders()):
            try:
                tensors, record = self._read(folder)
                return int(record["next_step"]), tensors, record
            except (CheckpointError, OSError, ValueError) as error:
                logger.warning("a damaged training state is skipped: %s", error)
            except (KeyError, TypeError):
                logger.warning("a damaged training state is skipped: state.json in %s has no next_step.", folder)
        return None

    def at(self, step: int) -> State:
        """The state of a step.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        tensors, record = self._read(self.folder(step))
        return step, tensors, record

    def save(self, next_step: int, tensors: dict[str, torch.Tensor], record: StateRecord) -> None:
        """Copy the tensors to the CPU now, and write the state in a thread."""
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        whole: StateRecord = {**record, "next_step": next_step}
        arguments = (next_step, copies, whole)
        self._thread = threading.Thread(target=self._write, args=arguments, name="state-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in progress.

        Raises:
            DiskFullError: it failed for want of space.
            OSError: it failed otherwise.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _folders(self) -> list[tuple[int, str]]:
        """Step and location of every state, complete or not, oldest first."""
        matches = [match for name in storage.list_folders(self.location) if (match := _FOLDER.match(name))]
        return sorted((int(match[1]), storage.join(self.location, match[0])) for match in matches)

    def _read(self, folder: str) -> tuple[dict[str, torch.Tensor], StateRecord]:
        if storage.is_local(folder):
            return _load(storage.absolute(folder))
        with tempfile.TemporaryDirectory() as local:
            storage.download_files(folder, storage.list_names(folder), Path(local))
            return _load(local)

    def _write(self, next_step: int, tensors: dict[str, torch.Tensor], record: StateRecord) -> None:
        try:
            with storage.disk_full_as_error(f"the training state of step {next_step} in {self.location}"):
                self._write_state(next_step, tensors, record)
            self.whole_step = next_step
            self._thin_out()
        except BaseException as error:
            self._error = error

    def _write_state(self, next_step: int, tensors: dict[str, torch.Tensor], record: StateRecord) -> None:
        folder = self.folder(next_step)
        if storage.is_local(folder):
            save_training_state(storage.absolute(folder), tensors, record)
        else:
            with tempfile.TemporaryDirectory() as local:
                storage.upload_folder(save_training_state(Path(local) / "state", tensors, record), folder, MANIFEST)

    def _thin_out(self) -> None:
        folders = [folder for _, folder in self._folders()]
        kept = set(folders[-self.keep :])
        if self.keep_best:
            losses = {folder: self._loss(folder) for folder in folders}
            kept.add(min(folders, key=lambda folder: losses[folder]))
        removed = sorted(set(folders) - kept)
        if storage.is_local(self.location):
            removed += [str(leftover) for leftover in Path(storage.absolute(self.location)).glob(".*.tmp")]
        for folder in removed:
            try:
                storage.remove_folder(folder)
            except FileNotFoundError:
                logger.warning(
                    "%s was removed by another process: is a second run writing into %s? Stop one of the two: what "
                    "they write may mix.",
                    folder,
                    self.location,
                )
            except OSError as error:  # the next save tries again
                logger.warning("an older training state cannot be removed: %s", error)

    def _loss(self, folder: str) -> tuple[bool, float]:
        """Key of the best state, least first: a held-out loss, else the mean loss of training."""
        try:
            record: StateRecord = json.loads(storage.read_bytes(storage.join(folder, "state.json")))
        except (OSError, ValueError):
            return True, math.inf  # incomplete
        held_out, mean = record.get("held_out_loss"), record.get("mean_loss")
        loss = mean if held_out is None else held_out
        return held_out is None, math.inf if loss is None else float(loss)


def _load(folder: str) -> tuple[dict[str, torch.Tensor], StateRecord]:
    tensors, record = load_training_state(folder)
    return tensors, cast(StateRecord, record)


def collect_state(train_step: TrainStep) -> tuple[dict[str, torch.Tensor], StateRecord]:
    """Contents of a training state: trainable parameters, AdamW's moments, the scaler."""
    names = {id(parameter): name for name, parameter in train_step.named}
    tensors: dict[str, torch.Tensor] = {f"parameter/{name}": parameter for name, parameter in train_step.named}
    for parameter, moments in train_step.optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer/{key}/{names[id(parameter)]}"] = value
    return tensors, {"scaler": train_step.scaler.state_dict()}


def restore_parameters(train_step: TrainStep, tensors: dict[str, torch.Tensor]) -> None:
    """Load the parameters of a collected state into the model; the optimizer stays as it is."""
    with torch.no_grad():
        for name, parameter in train_step.named:
            parameter.copy_(tensors[f"parameter/{name}"])


def restore_state(train_step: TrainStep, tensors: dict[str, torch.Tensor], record: StateRecord) -> None:
    """Load a collected state into the model, the optimizer and the scaler.

    Raises:
        CheckpointError: the state belongs to another model or stage.
    """
    parameters = dict(train_step.named)
    stored = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if stored != set(parameters):
        different = sorted(stored.symmetric_difference(parameters))
        raise CheckpointError(
            f"the training state is of another stage or model: {different[0]} is in only one of them."
        )
    train_step.optimizer.state.clear()
    with torch.no_grad():
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "parameter":
                parameters[rest].copy_(tensor)
            elif kind == "optimizer":
                key, _, parameter_name = rest.partition("/")
                parameter = parameters[parameter_name]
                device = "cpu" if key == "step" and not parameter.is_cuda else parameter.device
                train_step.optimizer.state[parameter][key] = tensor.to(device)
    train_step.scaler.load_state_dict(record["scaler"])
