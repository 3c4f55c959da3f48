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
    "images": Piece("tinygptv/data/images.py", ("data/test_images.py", "data/test_image_values.py")),
    "processing": Piece(
        "tinygptv/data/processing.py",
        ("data/test_processing.py", "data/test_processing_chat.py", "data/test_image_values.py"),
    ),
    "image_orientation": Piece("tinygptv/data/image_orientation.py", ("data/test_orientation_tags.py",)),
    "drawing": Piece("tinygptv/data/drawing.py", ("data/test_drawing.py",)),
    "flatten": Piece("tinygptv/data/flatten.py", ("data/test_flatten.py",)),
    "chat_messages": Piece("tinygptv/data/chat_messages.py", ("data/test_chat_messages.py",)),
    "lru": Piece("tinygptv/lru.py", ("test_lru.py",)),
    "bounds": Piece("tinygptv/bounds.py", ("test_bounds.py",)),
}

_CHECKPOINT: dict[str, Piece] = {
    "checkpoint": Piece("tinygptv/checkpoint/checkpoint.py", ("checkpoint/test_checkpoint.py",)),
    "folders": Piece("tinygptv/checkpoint/folders.py", ("checkpoint/test_folders.py",)),
    "file_kinds": Piece("tinygptv/checkpoint/file_kinds.py", ("checkpoint/test_file_kinds.py",)),
    "pickle_check": Piece("tinygptv/checkpoint/pickle_check.py", ("checkpoint/test_pickle_check.py",), "not memory"),
}

_CONVERT: dict[str, Piece] = {
    "convert_sizes": Piece("tinygptv/convert/sizes.py", ("convert/test_sizes.py",)),
}

_MODEL: dict[str, Piece] = {}

_INFERENCE: dict[str, Piece] = {
    "prefix_cache": Piece("tinygptv/inference/prefix_cache.py", ("inference/test_prefix_cache.py",)),
    "engine": Piece("tinygptv/inference/engine.py", ("inference/test_engine_steps.py",)),
    "runner": Piece("tinygptv/inference/runner.py", ("inference/test_runner_plan.py",)),
    "inference_batch": Piece(
        "tinygptv/inference/batch.py", ("inference/test_batch.py",), "not equal_generate and not earlier_calls"
    ),
    "sampling": Piece("tinygptv/inference/sampling.py", ("inference/test_sampling.py",), "not cost_of_a_token"),
    "text_stream": Piece("tinygptv/inference/text_stream.py", ("inference/test_text_stream.py",)),
}

_QUANTIZATION: dict[str, Piece] = {
    "frozen_linear": Piece(
        "tinygptv/quantization/frozen_linear.py", ("quantization/test_frozen_linear.py",), "not compiled_layer"
    ),
    "quantization_metadata": Piece("tinygptv/quantization/metadata.py", ("quantization/test_metadata.py",)),
}

_LIBRARY_TRAINING: dict[str, Piece] = {
    "schedule": Piece("tinygptv/training/schedule.py", ("training/test_schedule.py", "training/test_bounds.py")),
    "step_memory": Piece("tinygptv/training/step_memory.py", ("training/test_memory_plan_values.py",)),
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
    "ingest_checked_rows": Piece("pipelines/data/ingest/checked_rows.py", ("data/ingest/test_checked_rows.py",)),
    "source_base": Piece("pipelines/data/sources/base.py", ("data/sources/test_base.py",)),
    "ingest_deduplicate": Piece("pipelines/data/ingest/deduplicate.py", ("data/ingest/test_deduplicate.py",)),
    "ingest_inputs": Piece(
        "pipelines/data/ingest/inputs.py", ("data/ingest/test_inputs.py", "data/ingest/test_publish_calls.py")
    ),
    "ingest_lists": Piece(
        "pipelines/data/ingest/lists.py", ("data/ingest/test_lists.py", "data/ingest/test_publish_calls.py")
    ),
    "source_annotations": Piece("pipelines/data/sources/annotations.py", ("data/sources/test_annotations.py",)),
    "source_drafts": Piece("pipelines/data/sources/drafts.py", ("data/sources/test_drafts.py",)),
    "source_pickles": Piece(
        "pipelines/data/sources/pickles.py", ("data/sources/test_pickles.py", "data/sources/test_json_files.py")
    ),
    "held_out": Piece("pipelines/data/held_out.py", ("data/test_held_out.py",)),
    "feature_plan": Piece("pipelines/feature_plan.py", ("test_feature_plan.py",)),
    "shard_cache": Piece("pipelines/data/shard_cache.py", ("data/test_shard_cache.py", "data/test_remote_shards.py")),
    "ingest_publish": Piece(
        "pipelines/data/ingest/publish.py", ("data/ingest/test_publish.py", "data/ingest/test_publish_calls.py")
    ),
    "ingest_staging": Piece("pipelines/data/ingest/staging.py", ("data/ingest/test_staging.py",)),
}

_FETCH: dict[str, Piece] = {
    "fetch_samples": Piece(
        "pipelines/fetch/samples.py", ("fetch/test_sample_parts.py", "fetch/test_sets_calls.py", "fetch/test_told.py")
    ),
    "fetch_single_images": Piece(
        "pipelines/fetch/single_images.py", ("fetch/test_single_images.py", "fetch/test_sample_parts.py")
    ),
    "fetch_addresses": Piece("pipelines/fetch/addresses.py", ("fetch/test_fetch_calls.py", "fetch/test_data.py")),
    "fetch_data": Piece(
        "pipelines/fetch/data.py", ("fetch/test_data.py", "fetch/test_sets_calls.py", "fetch/test_told.py")
    ),
    "fetch_datasets": Piece("pipelines/fetch/datasets.py", ("fetch/test_data.py", "fetch/test_sets_calls.py")),
    "fetch_sample": Piece(
        "pipelines/fetch/sample.py",
        ("fetch/test_sample_parts.py", "fetch/test_sample.py"),
        "not is_read_as_the_whole_set_is",
    ),
}

_STORAGE: dict[str, Piece] = {
    "storage_cache_folder": Piece("pipelines/storage/cache_folder.py", ("storage/test_cache_folder.py",)),
    "storage_location": Piece("pipelines/storage/location.py", ("test_storage.py",)),
    "storage_find": Piece("pipelines/storage/find.py", ("storage/test_find.py", "test_storage.py")),
    "storage_folders": Piece(
        "pipelines/storage/folders.py", ("storage/test_folders.py", "storage/test_work_folder.py", "test_storage.py")
    ),
    "storage_packed": Piece("pipelines/storage/packed.py", ("test_packed.py", "test_storage.py")),
    "json_files": Piece("pipelines/json_files.py", ("test_json_files.py",)),
    "redact": Piece("pipelines/redact.py", ("test_redact.py",)),
    "shared_paths": Piece("pipelines/shared_paths.py", ("test_shared_paths.py",)),
    "storage_retry": Piece("pipelines/storage/retry.py", ("storage/test_retry.py",)),
    "node_cache": Piece("pipelines/node_cache.py", ("test_node_cache.py",)),
}

_DRIVER_TESTS = tuple(
    f"training/test_{name}.py"
    for name in ("driver", "driver_parts", "ray_run", "job", "job_parts", "run_reports", "describe")
)
_QUICK_DRIVER = "not at_most and not at_once and not once_it_is_whole"

_TRAINING: dict[str, Piece] = {
    **{
        f"training_{name}": Piece(f"pipelines/training/{name}.py", _DRIVER_TESTS, _QUICK_DRIVER)
        for name in ("run", "job", "ray_entry", "result", "run_reports", "describe")
    },
    "training_guard": Piece(
        "pipelines/training/guard.py",
        ("training/test_guard.py", "training/test_guard_diagnosis.py"),
        "not end_alike and not leaves_its_step and not stay_left_out and not says_where and not bad_weights "
        "and not recovers and not eight_samples",
    ),
    "training_worker": Piece(
        "pipelines/training/worker.py",
        tuple(
            f"training/test_{name}.py"
            for name in ("worker", "worker_parts", "reporter", "reporter_words", "held_out_parts")
        ),
        "not same_samples and not once_per_step and not left_out and not fault_is_named",
    ),
    "states": Piece("pipelines/training/states.py", ("training/test_states.py",), "not goes_on_bit_for_bit"),
    "record": Piece("pipelines/training/record.py", ("training/test_record.py",)),
    "held_out_record": Piece("pipelines/training/held_out_record.py", ("training/test_held_out_record.py",)),
}

_SCORED_TESTS = tuple(
    f"evaluation/test_{name}.py" for name in ("flow", "score_run", "units", "pages", "page", "scoring")
)

_EVALUATION: dict[str, Piece] = {
    **{
        f"evaluation_{name}": Piece(f"pipelines/evaluation/{name}.py", _SCORED_TESTS)
        for name in ("run", "scoring", "page", "compare_page")
    },
    "evaluation_worker": Piece("pipelines/evaluation/worker.py", ("evaluation/test_units.py",)),
    "evaluation_answers": Piece(
        "pipelines/evaluation/answers.py", ("evaluation/test_scoring.py", "evaluation/test_flow.py")
    ),
    "evaluation_compare": Piece(
        "pipelines/evaluation/compare.py", ("evaluation/test_compare.py", "evaluation/test_pages.py")
    ),
}

_ABLATION: dict[str, Piece] = {
    "ablation_findings": Piece(
        "pipelines/ablation/findings.py",
        ("ablation/test_findings.py", "ablation/test_ablation.py"),
        "not loses_what_its_name_says and not table_3s_shape",
    ),
    "ablation_variant_run": Piece("pipelines/ablation/variant_run.py", ("ablation/test_variant_run.py",)),
    "ablation_variants": Piece(
        "pipelines/ablation/variants.py", ("ablation/test_variants.py", "ablation/test_calls.py")
    ),
}

_TRACKING: dict[str, Piece] = {
    "described": Piece("pipelines/tracking/described.py", ("tracking/test_described.py",)),
    "tracking_identity": Piece(
        "pipelines/tracking/identity.py",
        ("tracking/test_described.py", "tracking/test_mlflow_calls.py", "tracking/test_mlflow.py"),
    ),
    **{
        name: Piece(
            f"pipelines/tracking/{module}.py",
            ("tracking/test_mlflow.py", "tracking/test_mlflow_calls.py", "tracking/test_base.py"),
        )
        for name, module in (("mlflow", "mlflow"), ("tracking_base", "base"))
    },
    "outbox": Piece("pipelines/tracking/outbox.py", ("tracking/test_outbox.py",)),
    "tracking_client": Piece("pipelines/tracking/client.py", ("tracking/test_client.py",)),
    "mlflow_names": Piece("pipelines/tracking/names.py", ("tracking/test_mlflow_calls.py", "tracking/test_mlflow.py")),
    "registry": Piece("pipelines/tracking/registry.py", ("tracking/test_registry.py",)),
}

_SERVING: dict[str, Piece] = {
    "protocol": Piece("pipelines/serving/protocol.py", ("serving/test_protocol.py",)),
    "gate": Piece("pipelines/serving/gate.py", ("serving/test_gate.py",)),
    "media": Piece("pipelines/serving/media.py", ("serving/test_media_loader.py",)),
    "data_url": Piece("tinygptv/data/data_url.py", ("data/test_data_url.py",)),
    "fetch": Piece("pipelines/serving/fetch.py", ("serving/test_fetch.py",)),
    "serving_service": Piece("pipelines/serving/service.py", ("serving/test_service.py",)),
    "serving_answers": Piece("pipelines/serving/answers.py", ("serving/test_answers.py",)),
    "serving_turns": Piece("pipelines/serving/turns.py", ("serving/test_turns.py",)),
    "serving_responses": Piece("pipelines/serving/responses.py", ("serving/test_responses.py",)),
    "response_answers": Piece("pipelines/serving/response_answers.py", ("serving/test_response_answers.py",)),
    "serving_body": Piece("pipelines/serving/body.py", ("serving/test_body.py",)),
    "serving_metrics": Piece("pipelines/serving/metrics.py", ("serving/test_metrics.py",)),
    "serving_batch": Piece("pipelines/serving/batch.py", ("serving/test_batch_parts.py", "serving/test_batch_runs.py")),
    "serving_errors": Piece("pipelines/serving/errors.py", ("serving/test_errors.py",)),
    "serving_artifact": Piece("pipelines/serving/artifact.py", ("serving/test_artifact.py",)),
    "serving_clients": Piece("pipelines/serving/clients.py", ("serving/test_clients.py",)),
    "serving_connections": Piece("pipelines/serving/connections.py", ("serving/test_connections.py",)),
    "serving_line": Piece("pipelines/serving/line.py", ("serving/test_line.py",)),
    "serving_app": Piece("pipelines/serving/app.py", ("serving/test_app.py",)),
    "serving_run": Piece("pipelines/serving/run.py", ("serving/test_start.py", "serving/test_run.py")),
    "model_backend": Piece("pipelines/serving/model_backend.py", ("serving/test_model_backend.py",)),
    "decoder_process": Piece("pipelines/serving/decoder_process.py", ("serving/test_decoder_process.py",)),
}

_SETTINGS: dict[str, Piece] = {
    "settings_command_line": Piece("pipelines/settings/command_line.py", ("settings",)),
    "settings_folders": Piece("pipelines/settings/folders.py", ("settings/test_folders.py",)),
    "settings_plain_yaml": Piece("pipelines/settings/plain_yaml.py", ("settings/test_plain_yaml.py",)),
    "settings_jobs": Piece("pipelines/settings/jobs.py", ("settings",)),
    "settings": Piece("pipelines/settings/base.py", ("settings",)),
}

_JOBS: dict[str, Piece] = {
    "console": Piece("pipelines/console.py", ("test_console.py",), "not loads_nothing_heavy"),
    "progress": Piece("pipelines/progress.py", ("test_progress.py",)),
    **{
        name: Piece(
            f"pipelines/{name}.py",
            ("test_export.py", "test_export_calls.py", "test_released.py", "test_released_calls.py"),
        )
        for name in ("export", "released")
    },
    "fingerprint": Piece("pipelines/fingerprint.py", ("test_fingerprint.py",)),
    "cluster": Piece("pipelines/cluster.py", ("test_cluster.py", "test_cluster_calls.py")),
    "units": Piece("pipelines/units.py", ("test_units.py", "test_units_on_ray.py")),
}

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
