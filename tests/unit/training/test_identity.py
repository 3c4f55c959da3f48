"""A stage's output belongs to one run: other data, start, seed or stage is refused; how it is computed may change."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from pipelines import storage
from pipelines.fingerprint import FINGERPRINT_FILE, OtherInputsError
from pipelines.miniature.tiny_training import STAGE, make_rows, train_settings, write_shard_set
from pipelines.settings import SettingsError
from pipelines.training.job import resolve_job
from pipelines.training.run import run_stage
from tinygptv.checkpoint.checkpoint import load_checkpoint, read_stage, save_checkpoint


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    run_stage(train_settings(world, output, max_steps=4), 4)
    return output


@pytest.fixture
def output(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "output")


def other_data(world, folder):
    for source in ("pairs", "questions"):
        rows = make_rows(source, 12)[::-1] if source == "pairs" else make_rows(source, 22)
        write_shard_set(folder / source, rows)
    return {**world, "data": str(folder)}


def other_start(world, folder):
    model, processor, _ = load_checkpoint(world["init_from"])
    next(model.projector.parameters()).data += 1e-3
    return {**world, "init_from": str(save_checkpoint(folder, model, processor, {}))}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "number", "difference"),
    [
        ({"seed": 7}, 4, "seed was 0, is now 7"),
        ({"precision": "bf16"}, 4, 'precision was "fp32", is now "bf16"'),
        ({"encoder_precision": "bf16"}, 4, 'encoder_precision was "fp32", is now "bf16"'),
        ({"stage": {"schedule": {**STAGE["schedule"], "peak": 2e-2}}}, 4, "stage.schedule.peak was 0.01, is now 0.02"),
        ({"stage": {"lora_rank": 4}}, 4, "stage.lora_rank was 2, is now 4"),
        ({"stage": {"draws_per_step": 3}}, 4, "stage.draws_per_step was 2, is now 3"),
        (
            {
                "stage": {
                    "sources": {"pairs": {"weight": 5, "batch_size": 4}, "questions": {"weight": 1, "batch_size": 3}}
                }
            },
            4,
            "stage.sources.pairs.weight was 2, is now 5",
        ),
        ({}, 3, "stage.number was 4, is now 3"),
    ],
)
def test_what_decides_the_weights_is_part_of_the_identity(world, output, changes, number, difference):
    before = contents(output)
    with pytest.raises(OtherInputsError, match=difference):
        run_stage(train_settings(world, output, **{"max_steps": 4, **changes}), number)
    assert contents(output) == before, "config.yaml included"


def test_other_data_and_another_start_are_refused(world, output, tmp_path):
    with pytest.raises(OtherInputsError, match=r"data\.pairs was "):
        run_stage(train_settings(other_data(world, tmp_path / "data"), output, max_steps=4), 4)
    with pytest.raises(OtherInputsError, match="start was "):
        run_stage(train_settings(other_start(world, tmp_path / "start"), output, max_steps=4), 4)


def test_how_it_is_computed_and_where_the_inputs_lie_is_not(world, output, tmp_path):
    moved = {
        "data": str(shutil.copytree(world["data"], tmp_path / "data")),
        "init_from": str(shutil.copytree(world["init_from"], tmp_path / "start")),
    }
    changes = {
        "micro_batch_size": 1,
        "packing": True,
        "guard": "stop",
        "checkpoint_every": 5,
        "gradient_checkpointing": True,
    }
    result = run_stage(train_settings(moved, output, max_steps=4, **changes), 4)
    assert result["steps"] == 4


def test_a_run_is_not_continued_with_other_data(world, tmp_path):
    """Stopped after three steps, then the same output with other rows."""
    output = tmp_path / "run"
    run_stage(train_settings(world, output, max_steps=3), 4)
    with pytest.raises(OtherInputsError, match=r"data\.pairs"):
        run_stage(train_settings(other_data(world, tmp_path / "data"), output), 4)
    longer = run_stage(train_settings(world, output, max_steps=5), 4)
    assert longer["steps"] == 5 and len((output / "metrics.jsonl").read_text().splitlines()) == 5


def test_overwrite_begins_again(world, output):
    (output / "notes.txt").write_text("mine")
    result = run_stage(train_settings(world, output, max_steps=2, seed=7, overwrite=True), 4)
    assert result["steps"] == 2 and read_stage(result["checkpoint"])["seed"] == 7
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list((output / "states").glob("step-*")) and (output / "notes.txt").is_file()
    assert json.loads((output / FINGERPRINT_FILE).read_text())["seed"] == 7
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 7


@pytest.mark.parametrize("shared", [False, True])
def test_two_runs_at_once_do_not_share_a_folder(world, output, tmp_path, shared):
    """They would drop each other's records and states; ``overwrite`` would remove what the other one is writing."""
    changes = {"storage_path": str(output), "output": str(tmp_path / "driver")} if shared else {"output": str(output)}
    settings = train_settings(world, output, max_steps=4, overwrite=True).model_copy(update=changes)
    before = contents(output)
    with storage.alone(str(output)), pytest.raises(SettingsError, match="another run is writing into output="):
        run_stage(settings, 4)
    assert contents(output) == before
    assert run_stage(settings, 4)["steps"] == 4, "the lock is gone with the run"


def test_fewer_steps_than_were_done_are_refused(world, output):
    with pytest.raises(SettingsError, match="holds a run of 4 steps, and 2 are asked for"):
        run_stage(train_settings(world, output, max_steps=2), 4)
    (output / "result.json").unlink()
    with pytest.raises(SettingsError, match="holds a run of 3 steps, and 2 are asked for"):
        run_stage(train_settings(world, output, max_steps=2), 4)


def test_shared_storage_belongs_to_one_run_too(world, tmp_path):
    place = f"memory://bucket/{tmp_path.name}"
    run_stage(train_settings(world, tmp_path / "a", storage_path=place, max_steps=1), 4)
    with pytest.raises(OtherInputsError, match=r"memory://.* seed was 0, is now 1"):
        run_stage(train_settings(world, tmp_path / "b", storage_path=place, max_steps=1, seed=1), 4)


def test_the_start_is_never_overwritten(world, output):
    start = {**world, "init_from": str(output / "checkpoint")}
    for overwrite in (False, True):
        with pytest.raises(SettingsError, match=r"is an input, and .*checkpoint is written by this job"):
            resolve_job(train_settings(start, output, overwrite=overwrite), 4)
    assert (output / "checkpoint/manifest.json").is_file()
