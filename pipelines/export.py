"""Export: checkpoint -> low-bit weights -> drift check -> artifact folder -> MLflow's model registry.

The drift is measured on the artifact as it will be served: written, loaded again, and compared with the full model on
the same held-out samples. An artifact that drifts too far is not kept.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np

from pipelines import storage
from pipelines.data.shards import ShardSet, find_shard_sets
from pipelines.fingerprint import FINGERPRINT_FILE, Fingerprint, checkpoint_digest, refuse_inputs, refuse_others
from pipelines.json_files import read_json_object, write_json
from pipelines.node_cache import checked_checkpoint, local_checkpoint
from pipelines.settings import QuantizeSettings, SettingsError
from pipelines.settings.folders import refuse_no_folder
from pipelines.tracking.base import NullTracker, open_tracker
from pipelines.tracking.described import markdown_table, run_title
from pipelines.tracking.registry import register_model
from tinygptv.checkpoint.folders import MANIFEST, QUANTIZATION_FILE, is_whole
from tinygptv.quantization.metadata import (
    ArtifactMetadata,
    DriftRecord,
    bits_per_weight,
    read_metadata,
    source_stage,
    write_metadata,
)

if TYPE_CHECKING:
    import torch

    from tinygptv.data.processing import TinyGPTVProcessor
    from tinygptv.data.sample import SampleRow
    from tinygptv.inference.drift import Drift, HeldOut
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
_MEASURING_BYTES = 2 << 30
"""Memory of the measurement beside the weights: activations and the KV cache of a batch."""


class ExportError(ValueError):
    """The artifact is not good enough to be served; says by how much."""


class ExportResult(TypedDict):
    """``result.json`` of an export.

    Attributes:
        bytes: of the stored weights.
        drift: rise of the held-out loss, in nats per token.
        answer_agreement: share of greedy answers that are equal to the full model's.
        checkpoint: what was quantized.
        artifact: the folder.
        method: how.
        version: number in the model registry; None where it was not registered.
        seconds: of the export.
        result: path of this file.
    """

    bytes: int
    drift: float
    answer_agreement: float
    checkpoint: str
    artifact: str
    method: str
    version: int | None
    seconds: float
    result: str


def export(settings: QuantizeSettings) -> ExportResult:
    """Quantize a checkpoint; a finished artifact of the same inputs is returned as it is.

    Raises:
        OtherInputsError: the folder holds an artifact of other inputs.
        SettingsError: a setting cannot be used, or another run is writing there.
        CheckpointError: the checkpoint is incomplete.
        ExportError: the drift is above ``settings.max_drift``; no artifact is left.
    """
    if not settings.checkpoint:
        raise SettingsError("give checkpoint=DIR, the checkpoint folder to quantize.")
    if settings.register_as and settings.tracking_uri == "none":
        raise SettingsError("register_as needs MLflow, but tracking_uri=none switches it off: drop one of the two.")
    started, began = time.perf_counter(), time.time()
    checkpoint = storage.absolute(settings.checkpoint)
    output = storage.Location.parse(settings.output_location(f"outputs/{settings.recipe}/artifact"))
    storage.check_access(output, writes=True)
    start = checked_checkpoint(checkpoint)
    refuse_inputs([output.uri], [checkpoint, settings.data])
    fingerprint = _fingerprint(settings, start)
    with ExitStack() as held:  # the lock, and the draft of an artifact that goes to a bucket
        held.enter_context(storage.alone(output.uri, is_replaced=True))
        folder = _earlier_artifact(output)
        finished = _finished_result(folder, output, fingerprint, overwrite=settings.overwrite) if folder else None
        if finished and (finished["version"] is not None or not settings.register_as):
            logger.info("the artifact is finished already: %s", output)
            return finished
        if not finished or not folder:
            if output.is_local:
                folder = Path(output.path)
            else:
                folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="artifact-")), "artifact")
            rows, data = held_out_rows(settings)
            _write(settings, start, folder, rows, data, fingerprint)
            if not output.is_local:
                storage.upload_folder(folder, output, MANIFEST)
        metadata = read_metadata(folder)
        result = ExportResult(
            bytes=metadata["bytes"],
            drift=metadata["drift"]["loss"],
            answer_agreement=metadata["drift"]["answer_agreement"],
            checkpoint=checkpoint,
            artifact=output.uri,
            method=settings.method,
            version=_track(settings, checkpoint, folder, metadata, began),
            seconds=round(time.perf_counter() - started, 1),
            result=(output / RESULT_FILE).uri,
        )
        write_json(result["result"], result)
    return result


def _earlier_artifact(output: storage.Location) -> Path | None:
    """What an earlier run left in the output, on this machine's disk; None where a bucket has nothing whole.

    Raises:
        SettingsError: the output holds something that is no artifact.
    """
    if output.is_local:
        return Path(output.path)
    names = storage.list_names(output)
    if MANIFEST in names:
        return local_checkpoint(output.uri)
    if names and QUANTIZATION_FILE not in names:
        raise SettingsError(f"output={output} holds something that is no artifact: give an empty or a new folder.")
    return None


def _fingerprint(settings: QuantizeSettings, checkpoint: Path) -> Fingerprint:
    names = ("method", "encoder", "keep_lora", "drift_samples", "max_drift", "seed")
    sets = [ShardSet.open(folder).manifest.digest for folder in _find_shard_sets(settings)] if settings.data else []
    return Fingerprint.of(
        "quantize",
        **{name: getattr(settings, name) for name in names},
        checkpoint=checkpoint_digest(checkpoint),
        data=sets,
    )


def _finished_result(
    folder: Path, output: storage.Location, fingerprint: Fingerprint, *, overwrite: bool
) -> ExportResult | None:
    """The result of an artifact that was made from these inputs; None where there is none.

    Raises:
        OtherInputsError: there is one of other inputs.
        SettingsError: the folder holds something else.
    """
    from tinygptv.quantization.artifact import is_artifact

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder.is_dir() and is_artifact(folder)):
        raise SettingsError(f"output={output} holds something that is no artifact: give an empty or a new folder.")
    if overwrite:
        return None
    refuse_others(str(output), fingerprint, read_json_object(folder / FINGERPRINT_FILE) or {})
    if not is_whole(folder):
        return None
    return cast(ExportResult, read_json_object((output / RESULT_FILE).uri) or {}) or None


def _track(
    settings: QuantizeSettings, checkpoint: str, folder: Path, metadata: ArtifactMetadata, began: float
) -> int | None:
    """Log the export, and register the artifact where asked for; returns the version's number."""
    title = run_title(settings.recipe, f"quantize {settings.method}", began)
    tracker = open_tracker(settings, title, started=began)
    tracker.params({**settings.model_dump(), "checkpoint": checkpoint})
    tracker.tags({"checkpoint": checkpoint, "method": settings.method})
    drift = metadata["drift"]
    shown = {"bytes": metadata["bytes"], "drift_loss": drift["loss"], "answer_agreement": drift["answer_agreement"]}
    tracker.metrics({f"quantized/{name}": value for name, value in shown.items()}, 0)  # charts of losses come before it
    tracker.describe(_description(metadata))
    tracker.artifact(folder / "quantization.json")
    version = None
    if settings.register_as:
        if isinstance(tracker, NullTracker):
            raise ExportError(f"{folder} is written but not registered: MLflow cannot be used (see the warning above).")
        tags = {"method": settings.method, "bytes": str(metadata["bytes"])}
        tags |= {f"drift.{name}": f"{value:.4g}" for name, value in _drift_numbers(drift).items()}
        version = register_model(settings, tracker.run_id, folder, settings.register_as, settings.alias, tags)
    tracker.close()
    return version


def _write(
    settings: QuantizeSettings,
    checkpoint: Path,
    folder: Path,
    rows: Sequence[SampleRow],
    data: str,
    fingerprint: Fingerprint,
) -> None:
    """Measure the full model, write the artifact, measure that, accept or refuse it."""
    from torch import nn

    from tinygptv.checkpoint.checkpoint import load_checkpoint
    from tinygptv.checkpoint.folders import remove_leftovers, write_folder
    from tinygptv.checkpoint.stored_weights import take_stored
    from tinygptv.inference.drift import compare
    from tinygptv.quantization.artifact import load_artifact, write_artifact

    device = _device(settings)
    model: TinyGPTVForConditionalGeneration | None
    model, processor, stage = load_checkpoint(checkpoint)
    model.requires_grad_(False)
    if model.config.lora_rank and not settings.keep_lora:
        model.merge_lora()
    nn.Module.to(model, _measuring_device(model, device))
    full = _measured("full", model, processor, rows, settings.seed)
    nn.Module.to(model, "cpu")
    take_stored(model, checkpoint)

    def fill(staging: Path) -> None:
        nonlocal model
        assert model is not None
        metadata = write_artifact(staging, model, processor, settings.method, device, encoder=settings.encoder)
        model = None  # both at once would need the memory of both
        quantized, _, _ = load_artifact(staging, device, verify=False)
        drift = compare(full, _measured(settings.method, quantized, processor, rows, settings.seed))
        _accept(drift, settings)
        metadata["bits_per_weight"] = round(bits_per_weight(metadata), 3)
        metadata["drift"] = {**drift.to_dict(), "max_loss": settings.max_drift, "data": data, "seed": settings.seed}
        metadata["stage"] = source_stage(stage)
        write_metadata(staging, metadata)
        write_json(staging / FINGERPRINT_FILE, dict(fingerprint.inputs))

    remove_leftovers(folder)
    with storage.disk_full_as_error(str(folder)):
        write_folder(folder, fill, also_ours=(RESULT_FILE,))


def _device(settings: QuantizeSettings) -> torch.device:
    """Methods for GPUs are rounded and measured on one where there is one."""
    import torch

    for_cpu = settings.method.startswith("cpu")
    return torch.device("cpu" if for_cpu or not torch.cuda.is_available() else "cuda")


def _measuring_device(model: TinyGPTVForConditionalGeneration, device: torch.device) -> torch.device:
    """Where the full model is measured: a card for low-bit weights may be too small for the full ones."""
    import torch

    if device.type == "cuda":
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        free = torch.cuda.mem_get_info(device)[0]
        if num_bytes + _MEASURING_BYTES > free:
            logger.info(
                "the full model (%.1f GB) is measured on the CPU: the GPU has %.1f GB free", num_bytes / 1e9, free / 1e9
            )
            return torch.device("cpu")
    return device


def _measured(
    name: str,
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    rows: Sequence[SampleRow],
    seed: int,
) -> HeldOut:
    from tinygptv.inference.drift import measure

    started = time.perf_counter()
    held_out = measure(model, processor, rows, seed)
    logger.info(
        "%s model: held-out loss %.4f nats per token over %d tokens (%.1f s)",
        name,
        held_out.losses.mean(),
        len(held_out.losses),
        time.perf_counter() - started,
    )
    return held_out


def _accept(drift: Drift, settings: QuantizeSettings) -> None:
    if not drift.loss <= settings.max_drift:  # also refuses NaN
        raise ExportError(
            f"method={settings.method} raises the held-out loss by {drift.loss:.4f} nats per token "
            f"({drift.full_loss:.4f} to {drift.quantized_loss:.4f}), more than max_drift={settings.max_drift}: "
            "no artifact was written; take a method with more bits, or raise max_drift."
        )


def _drift_numbers(drift: DriftRecord) -> dict[str, float]:
    return {key: value for key, value in drift.items() if isinstance(value, int | float) and key != "seed"}


def _description(metadata: ArtifactMetadata) -> str:
    """The artifact's size and drift as a table, for the tracker."""
    drift = metadata["drift"]
    full = {"model": "full", "held-out loss": drift["full_loss"]}
    quantized = {
        "model": metadata["method"],
        "held-out loss": drift["quantized_loss"],
        "MB": metadata["bytes"] / 1e6,
        "bits per weight": metadata.get("bits_per_weight"),
        "equal greedy answers": f"{drift['answer_agreement']:.1%} of {drift['num_answers']}",
    }
    return markdown_table([full, quantized])


# ---------------------------------------------------------------------- held-out samples


def held_out_rows(settings: QuantizeSettings) -> tuple[list[SampleRow], str]:
    """Samples for the drift check, and a description of them.

    Raises:
        FileNotFoundError: ``settings.data`` holds no shard set.
        ShardError: a shard set is damaged.
    """
    if not settings.data:
        return drawn_rows(settings.drift_samples, settings.seed), "drawn scenes of the miniature, split test"
    sets = [shards for folder in _find_shard_sets(settings) if len(shards := ShardSet.open(folder))]
    if not sets:
        raise FileNotFoundError(
            f"the shard sets in data={settings.data} have no rows: leave data empty, or prepare them."
        )
    generator = np.random.default_rng(settings.seed)
    numbers = [generator.permutation(len(shards))[: settings.drift_samples].tolist() for shards in sets]
    drawn = [(shards, number) for turn in zip_longest(*numbers) for shards, number in zip(sets, turn, strict=True)]
    kept = [(shards, number) for shards, number in drawn if number is not None][: settings.drift_samples]
    return [shards.row(number) for shards, number in kept], settings.data


def _find_shard_sets(settings: QuantizeSettings) -> list[str]:
    refuse_no_folder("data", settings.data, "prepared shard sets (jobs/prepare_data.py)")
    folders = find_shard_sets(storage.absolute(settings.data))
    if not folders:
        raise FileNotFoundError(
            f"data={settings.data} holds no shard set: make one with jobs/prepare_data.py, or leave data empty."
        )
    return folders


def drawn_rows(count: int, seed: int = 0) -> list[SampleRow]:
    """Held-out samples of the drawn world with their images, for exports without ``data``."""
    from tinygptv.miniature.documents import KINDS
    from tinygptv.miniature.draw import encode_jpeg
    from tinygptv.miniature.scenes import generator, make_scene

    kinds = [kind for kind in KINDS if kind != "pair"]
    rows = []
    for i in range(count):
        scene = make_scene(seed, "test", i)
        row = KINDS[kinds[i % len(kinds)]](scene, generator(scene.key, "drift"))
        rows.append(replace(row, id=f"drawn-{i}", image=encode_jpeg(scene) if row.width else None))
    return rows
