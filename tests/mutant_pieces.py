"""The pieces of ``tests.mutants``: each a module and the tests that hold it, by area."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A module and the tests that hold it.

    Attributes:
        module: path of the file that is changed.
        tests: files or folders below ``tests/unit``.
        only: pytest's ``-k``: leaves out tests of other modules that take seconds.
    """

    module: str
    tests: tuple[str, ...]
    only: str = ""


_DATA: dict[str, Piece] = {
    "mixture": Piece("tinygptv/data/mixture.py", ("data/test_mixture.py",)),
    "sample": Piece("tinygptv/data/sample.py", ("data/test_sample.py",)),
    "collate": Piece("tinygptv/data/collate.py", ("data/test_sample.py", "data/test_collate.py")),
    "boxes": Piece("tinygptv/data/boxes.py", ("data/test_boxes.py",)),
}

_CHECKPOINT: dict[str, Piece] = {
    "checkpoint": Piece("tinygptv/checkpoint/checkpoint.py", ("checkpoint/test_checkpoint.py",)),
    "folders": Piece("tinygptv/checkpoint/folders.py", ("checkpoint/test_folders.py",)),
}

_CONVERT: dict[str, Piece] = {}

_MODEL: dict[str, Piece] = {}

_INFERENCE: dict[str, Piece] = {}

_QUANTIZATION: dict[str, Piece] = {}

_LIBRARY_TRAINING: dict[str, Piece] = {
    "schedule": Piece("tinygptv/training/schedule.py", ("training/test_schedule.py", "training/test_bounds.py")),
    "train_step": Piece(
        "tinygptv/training/train_step.py", ("training/test_train_step_calls.py", "training/test_update_calls.py")
    ),
}

_METRICS: dict[str, Piece] = {
    "metrics": Piece("tinygptv/metrics/metrics.py", ("metrics/test_metrics.py",)),
    "intervals": Piece("tinygptv/metrics/intervals.py", ("metrics/test_intervals.py",)),
    "vqa_text": Piece("tinygptv/metrics/vqa_text.py", ("metrics/test_metrics.py",)),
}

_ROWS: dict[str, Piece] = {}

_FETCH: dict[str, Piece] = {}

_STORAGE: dict[str, Piece] = {}

_TRAINING: dict[str, Piece] = {
    "states": Piece("pipelines/training/states.py", ("training/test_states.py",), "not goes_on_bit_for_bit"),
    "record": Piece("pipelines/training/record.py", ("training/test_record.py",)),
}

_EVALUATION: dict[str, Piece] = {}

_ABLATION: dict[str, Piece] = {}

_TRACKING: dict[str, Piece] = {}

_SERVING: dict[str, Piece] = {
    "protocol": Piece("pipelines/serving/protocol.py", ("serving/test_protocol.py",)),
    "gate": Piece("pipelines/serving/gate.py", ("serving/test_gate.py",)),
    "media": Piece("pipelines/serving/media.py", ("serving/test_media_loader.py",)),
    "data_url": Piece("pipelines/serving/data_url.py", ("serving/test_data_url.py",)),
    "fetch": Piece("pipelines/serving/fetch.py", ("serving/test_fetch.py",)),
}

_SETTINGS: dict[str, Piece] = {
    "settings": Piece("pipelines/settings/base.py", ("settings",)),
}

_JOBS: dict[str, Piece] = {}

PIECES = {
    **_DATA,
    **_CHECKPOINT,
    **_CONVERT,
    **_MODEL,
    **_INFERENCE,
    **_QUANTIZATION,
    **_LIBRARY_TRAINING,
    **_METRICS,
    **_ROWS,
    **_FETCH,
    **_STORAGE,
    **_TRAINING,
    **_EVALUATION,
    **_ABLATION,
    **_TRACKING,
    **_SERVING,
    **_SETTINGS,
    **_JOBS,
}
