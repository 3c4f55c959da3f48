"""The ablation matrix, small: tasks on the cluster, nested MLflow runs, a report, and resuming after a stop."""

from __future__ import annotations

import json

import pytest

from pipelines.ablation.run import ablate
from pipelines.fingerprint import OtherInputsError
from pipelines.miniature.tiny_training import STAGE, make_world
from pipelines.settings import AblateSettings
from pipelines.training.record import RECORD_FILE
from tinygptv.miniature.writers import write_world

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "drawn", 1, 8, sources=())
    return {**make_world(folder), "benchmark_data": str(folder / "drawn")}


def settings(world, output, **changes):
    fields = {
        **world,
        "output": str(output),
        "variants": ["full", "no_qk_norm"],
        "stages": [1, 2],
        "precisions": ["fp32", "fp16_range"],
        "max_steps": 4,
        "score_limit": 4,
        "features": "inline",
        "tracking_uri": "none",
        "quiet": True,
        "train": {"micro_batch_size": 4},
        "stage": STAGE,
    }
    return AblateSettings(**{**fields, **changes})


def _first_loss(run):
    return json.loads((run / "stage1" / RECORD_FILE).read_text().splitlines()[0])["loss"]


@pytest.mark.slow
def test_matrix_on_the_cluster(ray_cluster, world, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    result = ablate(settings(world, tmp_path / "out", tracking_uri=uri))
    assert [(row["variant"], row["precision"]) for row in result["rows"]] == [
        ("full", "fp32"),
        ("no_qk_norm", "fp32"),
        ("full-fp16_range", "fp16_range"),
        ("no_qk_norm-fp16_range", "fp16_range"),
    ]
    for row in result["rows"]:
        assert [row["stages"][n]["status"] for n in ("1", "2")] == ["trained", "trained"], row
        assert row["stages"]["2"]["steps"] == 4 and row["stages"]["2"]["depth"]["projector"] > 0
        assert row["scores"]["miniature_vqa"]["n"] == 4 and row["scores"]["miniature_vqa"]["blind"] is not None
    # Step 0 only: the gradient scaler may then skip the first steps of the rounded run until its scale fits.
    losses = [_first_loss(tmp_path / "out" / row["variant"]) for row in result["rows"]]
    assert abs(losses[0] - losses[1]) > 1e-3, "the norm makes a difference"
    assert 0 < abs(losses[0] - losses[2]) < 1e-4, "and rounding a small one"
    assert json.loads((tmp_path / "out/result.json").read_text())["table"] == result["table"]

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tinygptv-mini")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name.startswith("mini ablation, ")]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {row["variant"] for row in result["rows"]}
    for child in children:
        assert len(client.get_metric_history(child.info.run_id, "loss/stage2")) == 4
        assert "norms/stage2/projector" in child.data.metrics and "score/miniature_vqa" in child.data.metrics
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"report.md", "report.html", "losses_fp32.png", "ablation.json", "result.json"} <= names
    head = parent.data.tags["mlflow.note.content"].splitlines()[0].replace("&emsp;", "")
    assert head == "| variant | precision | stage 1 | stage 2 | miniature_vqa |", "its page begins with the table"


def test_finished_stages_are_kept_and_a_lost_one_is_trained_again(world, tmp_path):
    matrix = settings(world, tmp_path, num_workers=0, precisions=["fp32"], benchmark="")
    first = ablate(matrix)
    kept = tmp_path / "full/stage1/result.json"
    before = kept.stat().st_mtime_ns
    (tmp_path / "no_qk_norm/stage2/result.json").unlink()
    second = ablate(matrix)
    assert kept.stat().st_mtime_ns == before
    assert second["rows"] == first["rows"]


def test_one_variant_that_fails_does_not_take_the_others_with_it(world, tmp_path):
    bad = "config.text_config.hidden_act=nonsense"
    result = ablate(settings(world, tmp_path, num_workers=0, precisions=["fp32"], variants=[bad, "full"], benchmark=""))
    failed, fine = result["rows"]
    assert failed["stages"]["1"]["status"] == "failed" and "nonsense" in failed["stages"]["1"]["note"]
    assert failed["stages"]["2"]["status"] == "not run"
    assert fine["stages"]["2"]["status"] == "trained"
    assert "failed" in (tmp_path / "report.md").read_text()


def test_an_ablation_belongs_to_its_inputs_and_takes_more_variants(world, tmp_path):
    small = {"num_workers": 0, "precisions": ["fp32"], "benchmark": "", "stages": [1], "max_steps": 1}
    ablate(settings(world, tmp_path, **small, variants=["full"]))
    kept = (tmp_path / "full/stage1/result.json").stat().st_mtime_ns
    more = ablate(settings(world, tmp_path, **small, variants=["full", "no_qk_norm"]))
    assert len(more["rows"]) == 2 and (tmp_path / "full/stage1/result.json").stat().st_mtime_ns == kept
    with pytest.raises(OtherInputsError, match="seed was 0, is now 1"):
        ablate(settings(world, tmp_path, **small, variants=["full"], seed=1))
    other = {**world, "data": str(make_world(tmp_path / "other", rows=12)["data"])}
    with pytest.raises(OtherInputsError, match=r"full/stage1 holds results of other inputs: data\.pairs was"):
        ablate(settings(other, tmp_path, **small, variants=["full"]))  # a mistake of the user, no failed variant
    again = ablate(settings(other, tmp_path, **small, variants=["full"], overwrite=True))
    assert again["rows"][0]["stages"]["1"]["status"] == "trained"
    assert (tmp_path / "full/stage1/result.json").stat().st_mtime_ns != kept
