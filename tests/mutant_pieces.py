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

_ROWS: dict[str, Piece] = {
    "loader": Piece(
        "pipelines/data/loader.py",
        ("data/test_loader_on_ray.py", "data/test_loader_calls.py"),
    ),
    "shards": Piece(
        "pipelines/data/shards.py",
        ("data/test_shards.py", "data/test_remote_shards.py"),
        "not hugging_face and not polars and not duckdb",
    ),
    "shard_format": Piece(
        "pipelines/data/shard_format.py",
        ("data/test_shards.py",),
        "not hugging_face and not polars and not duckdb",
    ),
    "shard_cache": Piece("pipelines/data/shard_cache.py", ("data/test_shard_cache.py", "data/test_remote_shards.py")),
    "held_out": Piece("pipelines/data/held_out.py", ("data/test_held_out.py",)),
    "features": Piece("pipelines/data/features.py", ("data/test_features_calls.py",)),
    "feature_set": Piece("pipelines/data/feature_set.py", ("data/test_features_calls.py",)),
    "feature_plan": Piece("pipelines/feature_plan.py", ("test_feature_plan.py",)),
    "ingest_publish": Piece(
        "pipelines/data/ingest/publish.py", ("data/ingest/test_publish.py", "data/ingest/test_publish_calls.py")
    ),
    "ingest_staging": Piece(
        "pipelines/data/ingest/staging.py", ("data/ingest/test_staging.py", "data/ingest/test_publish_calls.py")
    ),
    "ingest_deduplicate": Piece("pipelines/data/ingest/deduplicate.py", ("data/ingest/test_deduplicate.py",)),
    "ingest_checked_rows": Piece("pipelines/data/ingest/checked_rows.py", ("data/ingest/test_checked_rows.py",)),
    "ingest_report": Piece("pipelines/data/ingest/report.py", ("data/ingest/test_report.py",)),
    "ingest_job": Piece("pipelines/data/ingest/job.py", ("data/ingest/test_job.py",)),
    "ingest_check_images": Piece(
        "pipelines/data/ingest/check_images.py",
        ("data/ingest/test_check_images.py", "data/ingest/test_checks_calls.py"),
    ),
    "ingest_check_rows": Piece(
        "pipelines/data/ingest/check_rows.py", ("data/ingest/test_check_rows.py", "data/ingest/test_checks_calls.py")
    ),
    "ingest_inputs": Piece("pipelines/data/ingest/inputs.py", ("data/ingest/test_inputs.py",)),
    "ingest_lists": Piece(
        "pipelines/data/ingest/lists.py", ("data/ingest/test_publish.py", "data/ingest/test_publish_calls.py")
    ),
    "source_table": Piece("pipelines/data/sources/__init__.py", ("data/sources/test_base.py",)),
    "source_annotations": Piece("pipelines/data/sources/annotations.py", ("data/sources/test_base.py",)),
    "source_base": Piece("pipelines/data/sources/base.py", ("data/sources/test_base.py",)),
    "source_conversations": Piece("pipelines/data/sources/conversations.py", ("data/sources/test_conversations.py",)),
    "source_delimited": Piece("pipelines/data/sources/delimited.py", ("data/sources/test_delimited.py",)),
    "source_drafts": Piece("pipelines/data/sources/drafts.py", ("data/sources/test_drafts.py",)),
    "source_entries": Piece("pipelines/data/sources/entries.py", ("data/sources/test_entries.py",)),
    "source_images": Piece("pipelines/data/sources/images.py", ("data/sources/test_images.py",)),
    "json_entries": Piece("pipelines/data/sources/json_entries.py", ("data/sources/test_json_entries.py",)),
    "json_items": Piece("pipelines/data/sources/json_items.py", ("data/sources/test_json_files.py",)),
    "source_own": Piece("pipelines/data/sources/own.py", ("data/sources/test_own.py",)),
    "own_rows": Piece("pipelines/data/sources/own_rows.py", ("data/sources/test_own_rows.py",)),
    "pickles": Piece("pipelines/data/sources/pickles.py", ("data/sources/test_pickles.py",)),
    "questions": Piece("pipelines/data/sources/questions.py", ("data/sources/test_questions.py",)),
    "referring": Piece("pipelines/data/sources/referring.py", ("data/sources/test_referring.py",)),
    "table_files": Piece("pipelines/data/sources/table_files.py", ("data/sources/test_tables.py",)),
    "tar": Piece("pipelines/data/sources/tar.py", ("data/sources/test_tar.py", "data/sources/test_tar_members.py")),
    "tar_scan": Piece("pipelines/data/sources/tar_scan.py", ("data/sources/test_tar_scan.py",)),
}

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
