"""A stage as a Ray Train job: one worker or two, one stage after another, and the same numbers as in one process."""

from __future__ import annotations

import json

import pytest

from pipelines.train import run_stage
from tests.worlds import make_world, train_settings
from tinygptv.checkpoint import load_checkpoint

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """An uninterrupted run in this process."""
    output = tmp_path_factory.mktemp("straight")
    run_stage(train_settings(world, output), 4)
    return output


def record(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output):
    return [entry["loss_hex"] for entry in record(output)]


def test_a_worker_trains_as_this_process_does(ray_cluster, world, straight, tmp_path):
    result = run_stage(train_settings(world, tmp_path, num_workers=1), 4)
    assert losses(tmp_path) == losses(straight)
    assert result["steps"] == 12 and json.loads((tmp_path / "result.json").read_text()) == result
    model, _, facts = load_checkpoint(result["checkpoint"])
    expected, _, _ = load_checkpoint(straight / "checkpoint")
    assert facts["stage"] == 4
    assert all((a == b).all() for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))


def test_two_workers_and_the_next_stage(ray_cluster, world, straight, tmp_path):
    """The samples of a step are the same whatever the number of workers; the losses are, to rounding."""
    first = run_stage(train_settings(world, tmp_path / "1", num_workers=2, stage={"sources": PAIRS}), 1)
    second = run_stage(
        train_settings({**world, "init_from": first["checkpoint"]}, tmp_path / "2", num_workers=2, loader_workers=1), 4
    )
    inline = run_stage(train_settings({**world, "init_from": first["checkpoint"]}, tmp_path / "inline"), 4)
    assert load_checkpoint(second["checkpoint"])[2]["init_from"] == first["checkpoint"]
    for a, b in zip(record(tmp_path / "2"), record(tmp_path / "inline"), strict=True):
        assert a["sample_ids"] == b["sample_ids"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    assert second["last_loss"] == pytest.approx(inline["last_loss"], rel=2e-4)


PAIRS = {"pairs": {"weight": 1, "batch_size": 4}}
