"""``quantization.json`` of an artifact: method, format and size of every part, drift (docs/quantization.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from tinygptv.checkpoint.folders import QUANTIZATION_FILE, CheckpointError, read_object
from tinygptv.checkpoint.stage_record import StageRecord

FORMAT_VERSION = 1


class PartRecord(TypedDict):
    """One part of the model.

    Attributes:
        format: of its linear layers: key of ``artifact.FORMATS``, ``half`` or ``full``.
        parameters: how many it has.
        bytes: stored.
    """

    format: str
    parameters: int
    bytes: int


class DriftRecord(TypedDict):
    """The drift as it was measured (``inference.drift.Drift``), and what it was accepted by.

    Attributes:
        max_loss: largest rise of the loss that was allowed, in nats per token.
        data: description of the samples.
        seed: of the samples' wordings.
    """

    loss: float
    full_loss: float
    quantized_loss: float
    full_perplexity: float
    quantized_perplexity: float
    answer_agreement: float
    num_tokens: int
    num_answers: int
    max_loss: NotRequired[float]
    data: NotRequired[str]
    seed: NotRequired[int]


class SourceStage(TypedDict, total=False):
    """The stage that made the checkpoint, as far as its ``stage.json`` tells."""

    recipe: str
    stage: int
    steps: int


class ArtifactMetadata(TypedDict):
    """Content of ``quantization.json``.

    Attributes:
        format_version: of this file and the stored tensors.
        method: key of ``artifact.METHODS``.
        parts: by name.
        bytes: stored, of all parts.
        lora: ``kept``, or ``merged`` into the weights.
        bits_per_weight: mean stored bits of a parameter.
        drift: against the full model; an artifact that no export accepted has none.
        stage: the checkpoint's.
    """

    format_version: int
    method: str
    parts: dict[str, PartRecord]
    bytes: int
    lora: str
    bits_per_weight: NotRequired[float]
    drift: NotRequired[DriftRecord]
    stage: NotRequired[SourceStage]


def read_metadata(folder: str | Path) -> ArtifactMetadata:
    """Contents of ``quantization.json``.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    path = Path(folder) / QUANTIZATION_FILE
    try:
        metadata = read_object(path)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}: export the artifact again.") from error
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} is of version {version}; this code reads {FORMAT_VERSION}: export it again.")
    return cast(ArtifactMetadata, metadata)


def source_stage(record: StageRecord) -> SourceStage:
    """What an artifact keeps of its checkpoint's ``stage.json``."""
    return cast(SourceStage, {key: value for key, value in record.items() if key in SourceStage.__annotations__})


def write_metadata(folder: Path, metadata: ArtifactMetadata) -> None:
    """Write ``quantization.json``."""
    (folder / QUANTIZATION_FILE).write_text(json.dumps(metadata, indent=1))


def bits_per_weight(metadata: ArtifactMetadata) -> float:
    """Mean stored bits of a parameter, over all parts."""
    return 8 * metadata["bytes"] / math.fsum(part["parameters"] for part in metadata["parts"].values())
