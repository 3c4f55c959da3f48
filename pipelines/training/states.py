"""Where a stage stands: the checkpoints taken while it runs, the per-step record, and the run's identity.

<storage>/states/step-00000500/   training state: what trains, optimizer, position (tinygptv.checkpoint.checkpoint)
<storage>/checkpoint/             the whole model, at the end of the stage
<output>/metrics.jsonl            one line per step; cut back to the state's step when a run goes on
<output>/run.json                 the tracker's run, so that a resumed stage continues the same one

``storage`` is the output folder, or what ``storage_path`` names: a folder or URI that all nodes reach.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from pipelines import storage
from tinygptv.checkpoint.checkpoint import MANIFEST, CheckpointError, load_training_state, save_training_state
from tinygptv.training.train_step import TrainStep

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"step-(\d{8})$")

State = tuple[int, dict[str, torch.Tensor], dict[str, Any]]
"""Next step, tensors, and the rest."""


class StateStore:
    """Training states of one run in a folder or URI; saving happens in the background."""

    def __init__(self, place: str, keep: int, *, keep_best: bool = False) -> None:
        """Open.

        Args:
            place: folder or URI; need not exist.
            keep: newest states to keep.
            keep_best: also keep the one with the least ``mean_loss``.
        """
        self.place = place
        self.keep = keep
        self.keep_best = keep_best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def newest(self) -> State | None:
        """The newest whole state; damaged ones are named in the log and passed over."""
        for _, folder in reversed(self._folders()):
            try:
                tensors, extra = self._read(folder)
            except (CheckpointError, OSError, ValueError, KeyError) as error:
                logger.warning("passing over a damaged training state: %s", error)
                continue
            return int(extra["next_step"]), tensors, extra
        return None

    def save(self, next_step: int, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        """Write a state without stalling the step: tensors are copied now and written in a thread."""
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        arguments = (next_step, copies, {**extra, "next_step": next_step})
        self._thread = threading.Thread(target=self._write, args=arguments, name="state-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in progress; raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _folders(self) -> list[tuple[int, str]]:
        """Step and place of every state, whole or not, oldest first."""
        filesystem, path = storage.resolve(self.place)
        found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        matches = [match for info in found if (match := _FOLDER.match(info.base_name))]
        return sorted((int(match[1]), storage.join(self.place, match[0])) for match in matches)

    def _read(self, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        if storage.is_local(folder):
            return load_training_state(folder.removeprefix("file://"))
        with tempfile.TemporaryDirectory() as local:
            download_folder(folder, Path(local))
            return load_training_state(local)

    def _write(self, next_step: int, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        try:
            folder = storage.join(self.place, f"step-{next_step:08d}")
            if storage.is_local(folder):
                save_training_state(folder.removeprefix("file://"), tensors, extra)
            else:
                with tempfile.TemporaryDirectory() as local:
                    upload_folder(save_training_state(Path(local) / "state", tensors, extra), folder)
            self._thin_out()
        except BaseException as error:
            self._error = error

    def _thin_out(self) -> None:
        folders = [folder for _, folder in self._folders()]
        kept = set(folders[-self.keep :])
        if self.keep_best:
            losses = {folder: self._mean_loss(folder) for folder in folders}
            kept.add(min(folders, key=lambda folder: losses[folder]))
        for folder in set(folders) - kept:
            storage.remove_folder(folder)
        if storage.is_local(self.place):
            for leftover in Path(self.place.removeprefix("file://")).glob(".*.tmp"):
                storage.remove_folder(str(leftover))

    def _mean_loss(self, folder: str) -> float:
        try:
            return float(json.loads(storage.read_bytes(storage.join(folder, "state.json"))).get("mean_loss", "inf"))
        except (OSError, ValueError):
            return float("inf")  # half-written


def upload_folder(source: Path, target: str) -> None:
    """Copy a checkpoint folder to any storage, its manifest last: without it, it is none."""
    storage.make_folder(target)
    for path in sorted(source.iterdir(), key=lambda path: path.name == MANIFEST):
        filesystem, place = storage.resolve(storage.join(target, path.name))
        with path.open("rb") as stream, filesystem.open_output_stream(place) as sink:
            shutil.copyfileobj(stream, sink, storage.COPY_BYTES)


def download_folder(source: str, target: Path) -> Path:
    """Copy a checkpoint folder of any storage to a local one."""
    target.mkdir(parents=True, exist_ok=True)
    for name in storage.list_names(source):
        storage.download(storage.join(source, name), target / name)
    return target


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
    step.optimizer.state.clear()
    with torch.no_grad():
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "parameter":
                parameters[rest].copy_(tensor)
            elif kind == "optimizer":
                key, _, parameter_name = rest.partition("/")
                parameter = parameters[parameter_name]
                device = "cpu" if key == "step" and not parameter.is_cuda else parameter.device
                step.optimizer.state[parameter][key] = tensor.to(device)
    step.scaler.load_state_dict(extra["scaler"])
