"""Held-out rows: which they are, their loss while training, the best state, the early stop, and exact resumption."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from pipelines.data.held_out import hold_out, kept_counts, kept_row, row_hashes
from pipelines.data.loader import BatchMaker
from pipelines.data.shards import ShardSet
from pipelines.fingerprint import OtherInputsError
from pipelines.miniature.tiny_training import make_rows, train_settings, write_shard_set
from pipelines.settings import SettingsError
from pipelines.training import held_out_questions
from pipelines.training.held_out import HeldOutRows, HeldOutShare, open_sources
from pipelines.training.held_out_questions import HeldOutQuestions
from pipelines.training.held_out_record import Evaluation, HeldOutHistory, parse_evaluation, read_evaluations
from pipelines.training.job import resolve_job
from pipelines.training.plots import loss_curve, smooth
from pipelines.training.record import HELD_OUT_FILE
from pipelines.training.run import run_stage
from pipelines.training.sample_predictions import SamplePredictor
from tests.training_runs import run_until
from tinygptv.checkpoint.checkpoint import load_checkpoint
from tinygptv.data.sample import SampleRow, Turn
from tinygptv.training.stages import get_stage
from tinygptv.training.train_step import TrainStep

FRACTION = 0.2


@pytest.fixture(scope="module")
def settings_of(world):
    return lambda output, **changes: train_settings(world, output, **{"eval_fraction": FRACTION, **changes})


@pytest.fixture(scope="module")
def straight(settings_of, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight")
    return run_stage(settings_of(output, eval_every=4), 4), output


def losses(output):
    return [json.loads(line)["loss_hex"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def held_ids(world):
    shards = {name: ShardSet.open(f"{world['data']}/{name}") for name in ("pairs", "questions")}
    held = hold_out(shards, FRACTION)
    return {f"{name}/{shards[name].row_id(row)}" for name in held for row in held[name]}


def test_rows_are_held_out_by_image_and_stay_the_same_when_data_grows(tmp_path):
    rows = make_rows("pairs", 40)
    small = ShardSet.open(str(write_shard_set(tmp_path / "small", rows[:20])))
    large = ShardSet.open(str(write_shard_set(tmp_path / "large", rows[20:] + rows[:20], rows_per_shard=7)))
    before, after = ({s.row_id(int(row)) for row in hold_out({"a": s}, 0.3)["a"]} for s in (small, large))
    assert before and before == after & {row.id for row in rows[:20]}
    assert set(hold_out({"a": large}, 0.1)["a"]) < set(hold_out({"a": large}, 0.5)["a"])
    assert 0.2 < np.mean(row_hashes(ShardSet.open(str(write_shard_set(tmp_path / "b", make_rows("x", 200)))))) < 0.8


def test_rows_of_one_image_stay_together(tmp_path):
    from dataclasses import replace

    rows = [replace(row, id=f"{row.id}-{n}") for row in make_rows("pairs", 10) for n in range(3)]
    hashes = row_hashes(ShardSet.open(str(write_shard_set(tmp_path / "set", rows)))).reshape(10, 3)
    assert (hashes == hashes[:, :1]).all() and len(np.unique(hashes)) == 10


def test_counting_around_held_out_rows():
    held = np.array([0, 1, 4, 9])
    kept = [row for row in range(12) if row not in held]
    assert [kept_row(held, index) for index in range(8)] == kept
    assert kept_counts((3, 3, 6), held) == (1, 2, 5)
    assert [kept_row(np.zeros(0, dtype=int), index) for index in range(3)] == [0, 1, 2]


def test_held_out_rows_are_never_trained_on(straight, world):
    seen = {
        s for line in (straight[1] / "metrics.jsonl").read_text().splitlines() for s in json.loads(line)["sample_ids"]
    }
    held = held_ids(world)
    assert held and seen and not seen & held


def test_losses_are_recorded_per_source_and_in_the_result(straight, world):
    result, output = straight
    found = read_evaluations(output / HELD_OUT_FILE)
    assert [each["step"] for each in found] == [0, 4, 8, 12]
    assert all(set(each["sources"]) == {"pairs", "questions"} for each in found)
    held_out = result["held_out"]
    assert (held_out["first"], held_out["last"]) == (found[0]["loss"], found[-1]["loss"])
    assert held_out["best"] == min(each["loss"] for each in found) < held_out["first"]
    assert held_out["checkpoint_step"] == 12 and sum(held_out["rows"].values()) == len(held_ids(world))
    assert json.loads((output / "result.json").read_text())["held_out"]["best_step"] == held_out["best_step"]


def test_the_loss_is_the_mean_over_the_tokens_of_the_rows(straight, settings_of, tmp_path):
    """Computed again from the checkpoint, in other micro-batches and as three workers."""
    job, _ = resolve_job(settings_of(tmp_path, micro_batch_size=2), 4)
    model, _, _ = load_checkpoint(straight[1] / "checkpoint")
    step = TrainStep(model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), num_sources=2)
    shares = [HeldOutRows(job.settings, job.plan.for_worker(rank, 3), step).share() for rank in range(3)]
    found = HeldOutHistory().add(12, shares)
    assert found["loss"] == pytest.approx(straight[0]["held_out"]["last"], rel=1e-4)
    assert found["scores"] == read_evaluations(straight[1] / HELD_OUT_FILE)[-1]["scores"]


def question_rows():
    """Rows of the four kinds: several annotators, one answer, a box, a phrase; and one that is no question."""
    image = make_rows("pairs", 1)[0]
    fields = {"image": image.image, "width": 100, "height": 100}
    box = {**fields, "boxes": ((10.0, 20.0, 50.0, 60.0),)}
    return [
        SampleRow("a", "q", "vqa", (Turn("many?", ("two",) * 4 + ("three",) * 2),), **fields),
        SampleRow("b", "q", "caption", (Turn("", ("two",)),), **fields),
        SampleRow("c", "q", "vqa", (Turn("one?", ("a cat",)),)),
        SampleRow("d", "q", "refer", (Turn("", ("red star",)),), **box),
        SampleRow("e", "q", "identify", (Turn("", ("red star", "star")),), **box),
    ]


@pytest.fixture
def asked(settings_of, world, tmp_path):
    """Questions of ``question_rows``, with a model whose answers are given by instruction."""
    shards = ShardSet.open(str(write_shard_set(tmp_path / "q", question_rows())))
    job, _ = resolve_job(settings_of(tmp_path / "out"), 4)
    model, _, _ = load_checkpoint(world["init_from"])
    model.set_image_size(28)
    step = TrainStep(model.eval(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), num_sources=2)

    def make(rank=0, world_size=1, per_source=9):
        plan = job.plan.for_worker(rank, world_size)
        return HeldOutQuestions(BatchMaker(plan), {"q": (shards, range(len(shards)))}, step, per_source)

    return make


def test_rows_with_short_answers_are_asked_in_the_words_of_benchmarks(asked, monkeypatch):
    questions, heard = asked(), []
    answers = {
        "[vqa] Based on the image, respond to this question with a short answer: many?": "two",
        "[vqa] Based on the image, respond to this question with a short answer: one?": "A Cat",
        "[refer] give me the location of red star": "{<10><20><50><58>}",
        "[identify] what object is in this location {<10><20><50><60>}": "circle",
    }

    def answer(rows):
        heard.extend(held_out_questions.question_of(row) for row in rows)
        return [answers[held_out_questions.question_of(row).instruction] for row in rows]

    monkeypatch.setattr(questions, "_answer", answer)
    assert questions.sums() == {"q": (3.0, 4)} and questions.num_questions == {"q": 4}
    assert [each.num_images for each in heard] == [1, 1, 1, 0] and {e.instruction for e in heard} == set(answers)
    assert asked(per_source=2).num_questions == {"q": 2} and asked(per_source=0).num_questions == {}
    found = HeldOutHistory().add(3, [HeldOutShare({"q": (2.0, 4)}, {"q": (3.0, 4)})])
    assert found["scores"] == {"q": 75.0} and found["loss"] == 0.5


def test_a_batch_of_questions_is_answered_like_each_alone(asked, monkeypatch):
    """Prompts of unequal length, with and without an image."""
    questions = asked()
    rows = [row for row in question_rows() if row.task != "caption"]
    with_image = [row for row in rows if row.image is not None]
    alone = [questions._answer([row])[0] for row in rows]
    assert questions._answer(with_image) == [a for a, row in zip(alone, rows, strict=True) if row.image is not None]
    heard = []
    monkeypatch.setattr(
        questions, "_answer", lambda batch: heard.append([row.id for row in batch]) or [""] * len(batch)
    )
    questions.sums()
    assert [sorted(each) for each in heard] == [["a", "d", "e"], ["c"]]


def test_workers_share_the_questions(asked, monkeypatch):
    shares = []
    for rank in range(3):
        questions = asked(rank, 3)
        monkeypatch.setattr(questions, "_answer", lambda rows: ["two"] * len(rows))
        shares.append(questions.sums()["q"])
    assert [number for _, number in shares] == [2, 1, 1] and sum(score for score, _ in shares) == 1.0


def test_scores_are_recorded_and_read_again(straight):
    result, output = straight
    found = read_evaluations(output / HELD_OUT_FILE)
    assert all(set(each["scores"]) == {"questions"} for each in found), "captions are no questions"
    scores = result["held_out"]["scores"]["questions"]
    assert (scores["first"], scores["last"]) == tuple(found[place]["scores"]["questions"] for place in (0, -1))
    assert 0 < scores["questions"] < result["held_out"]["rows"]["questions"], "texts are not asked"
    assert parse_evaluation({"step": 0, "loss": 1, "sources": {}})["scores"] == {}, "written by an earlier version"


@pytest.mark.parametrize("at", [2, 5, 10])
def test_resumed_runs_stay_the_same_to_the_last_bit(straight, settings_of, tmp_path, monkeypatch, at):
    run_until(monkeypatch, at, settings_of(tmp_path, eval_every=4))
    result = run_stage(settings_of(tmp_path, eval_every=4), 4)
    assert losses(tmp_path) == losses(straight[1])
    assert (tmp_path / HELD_OUT_FILE).read_bytes() == (straight[1] / HELD_OUT_FILE).read_bytes()
    assert result["held_out"] == straight[0]["held_out"]


def test_evaluating_changes_no_step(straight, settings_of, tmp_path):
    run_stage(settings_of(tmp_path, eval_every=1, eval_rows=3, max_steps=3), 4)
    assert losses(tmp_path) == losses(straight[1])[:3]
    shutil.rmtree(tmp_path)
    run_stage(settings_of(tmp_path, eval_every=1, eval_questions=0, max_steps=3), 4)
    assert losses(tmp_path) == losses(straight[1])[:3]


def test_own_held_out_data_leaves_training_as_it_was(world, tmp_path):
    write_shard_set(tmp_path / "held/pairs", make_rows("pairs", 35)[30:])
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    changes = {"max_steps": 3, "eval_every": 2}
    run_stage(train_settings(world, plain, **changes), 4)
    result = run_stage(train_settings(world, evaluated, eval_data=str(tmp_path / "held"), **changes), 4)
    assert losses(plain) == losses(evaluated) and result["held_out"]["rows"] == {"pairs": 5}
    alone = tmp_path / "alone"
    found = run_stage(train_settings(world, alone, eval_data=str(tmp_path / "held/pairs"), **changes), 4)
    assert found["held_out"] == result["held_out"]


RISING = {"schedule": {"steps_per_epoch": 8, "epochs": 2, "peak": 3.0, "minimum": 3.0, "warmup_start": 1e-3}}
"""A learning rate that ruins the model after its first steps."""


@pytest.fixture(scope="module")
def stopped(settings_of, tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped")
    changes = {"eval_every": 2, "early_stop": 2, "use_best": True, "keep_checkpoints": 1, "guard": "off"}
    settings = settings_of(output, stage=RISING, **changes)
    return run_stage(settings, 4), output, settings


def test_training_ends_early_and_the_best_weights_are_written(stopped, settings_of, tmp_path):
    result, output, settings = stopped
    found = read_evaluations(output / HELD_OUT_FILE)
    held_out = result["held_out"]
    assert result["stopped_early"] and result["steps"] == found[-1]["step"] < 16
    assert held_out["best_step"] == found[-3]["step"] == held_out["checkpoint_step"]
    job, _ = resolve_job(settings, 4)
    model, _, metadata = load_checkpoint(output / "checkpoint")
    step = TrainStep(model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), num_sources=2)
    again = HeldOutHistory().add(0, [HeldOutRows(job.settings, job.plan, step).share()])
    assert again["loss"] == pytest.approx(held_out["best"], rel=1e-5) and metadata["steps"] == result["steps"]


def test_a_run_that_ended_early_is_finished(stopped):
    result, output, settings = stopped
    before = (output / "checkpoint/model.safetensors").stat().st_mtime_ns
    assert run_stage(settings, 4)["steps"] == result["steps"]
    assert (output / "checkpoint/model.safetensors").stat().st_mtime_ns == before


def test_the_best_state_is_kept(stopped):
    best = stopped[0]["held_out"]["best_step"]
    assert (stopped[1] / f"states/step-{best:08d}/manifest.json").is_file()


def test_what_decides_the_weights_is_part_of_the_identity(straight, settings_of):
    with pytest.raises(OtherInputsError, match=r"eval_fraction was 0\.2, is now 0\.4"):
        resolve_job(settings_of(straight[1], eval_fraction=0.4), 4)
    with pytest.raises(OtherInputsError, match="early_stop was absent, is now 3"):
        resolve_job(settings_of(straight[1], early_stop=3), 4)
    resolve_job(settings_of(straight[1], eval_every=1, eval_rows=7), 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eval_fraction": 0, "early_stop": 2}, SettingsError, "early_stop needs held-out rows: give eval_data"),
        ({"eval_fraction": 0, "use_best": True}, SettingsError, "use_best needs held-out rows"),
        ({"eval_data": "x"}, SettingsError, "eval_data and eval_fraction are both given"),
        ({"eval_fraction": 1e-9}, SettingsError, "holds out none of so few rows"),
        ({"eval_fraction": 0.9999999}, SettingsError, "leaves no row of pairs"),
        ({"eval_fraction": 0, "eval_data": "/nowhere"}, SettingsError, "eval_data=/nowhere does not exist"),
    ],
)
def test_mistakes(settings_of, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run_stage(settings_of(tmp_path, **changes), 4)


def test_the_plot_shows_losses_and_scores(straight, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shutil.copy(straight[1] / "metrics.jsonl", tmp_path)
    evaluations = [Evaluation(step=n, loss=1.0, sources={}, scores={"vqa": 10.0 * n}) for n in (0, 8, 12)]
    HeldOutHistory(evaluations).write(tmp_path / HELD_OUT_FILE)
    drawn, original = {}, Axes.plot

    def plot(self, *arguments, **more):
        drawn[more.get("label")] = arguments
        return original(self, *arguments, **more)

    monkeypatch.setattr(Axes, "plot", plot)
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", get_stage("mini", 4), "mini")
    assert {"loss per step", "held-out loss"} <= set(drawn)
    assert drawn["running mean"] == drawn["loss per step"], "of so few steps, one is the mean"
    assert smooth([4.0, 2.0, 6.0, 0.0], 2) == [4.0, 3.0, 4.0, 3.0] and smooth([1.0, 3.0], 1) == [1.0, 3.0]
    assert drawn["vqa"] == ([0, 8, 12], [0.0, 80.0, 120.0])


def test_the_rows_of_least_hash_are_evaluated_in_their_order(world, settings_of, tmp_path):
    """With wordings that are drawn from the hashes, so that they stay when rows move."""
    job, _ = resolve_job(settings_of(tmp_path / "a", eval_fraction=0, eval_data=world["data"], eval_rows=4), 4)
    shards = {name: ShardSet.open(f"{world['data']}/{name}") for name in ("pairs", "questions")}
    for source in open_sources(job.settings, job.plan, shards):
        hashes = row_hashes(shards[source.name])
        expected = sorted(range(len(hashes)), key=lambda row: (hashes[row], row))[:4]
        assert list(source.rows) == expected and list(source.hashes) == [hashes[row] for row in expected]
    rows = make_rows("pairs", 30)
    write_shard_set(tmp_path / "moved/pairs", rows[::-1])
    model, _, _ = load_checkpoint(world["init_from"])
    model.set_image_size(28)
    step = TrainStep(model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), num_sources=2)
    words = []
    for data in (f"{world['data']}/pairs", str(tmp_path / "moved/pairs")):
        settings = job.settings.model_copy(update={"eval_data": data})
        held = HeldOutRows(settings, job.plan, step)
        words.append([sample.encoded.input_ids for sample in held._samples(held.sources[0])])
    assert words[0] == words[1]
    whole = held.share().losses["pairs"][1]
    assert model.training, "it trains on"
    shares = [HeldOutRows(settings, job.plan.for_worker(rank, 3), step).share().losses["pairs"] for rank in range(3)]
    batches = held.maker.batch(list(held._samples(held.sources[0])))
    assert sum(tokens for _, tokens in shares) == whole == sum(len(batch.supervised_ids) for batch in batches)
    assert sum(batch.num_samples for batch in batches) == 4, "each of the rows once"


@pytest.mark.parametrize(
    ("answers", "said", "score"),
    [
        (("2", "2", "3"), "2", 4 / 9),
        (("2", "3"), "3", 1.0),
        (("red star", "star"), "star", 1.0),
        (("red star", "star"), "circle", 0.0),
    ],
)
def test_any_answer_of_few_people_is_right(answers, said, score):
    row = SampleRow("a", "q", "vqa", (Turn("x?", answers),))
    assert held_out_questions.SCORES["vqa"](said, row) == pytest.approx(score)
    assert held_out_questions.SCORES["identify"](said, row) == pytest.approx(score)


def test_the_first_of_equal_losses_is_the_best():
    history = HeldOutHistory()
    for step, (total, tokens) in {0: (4.0, 2), 4: (3.0, 2), 8: (6.0, 4), 12: (math.nan, 2)}.items():
        history.add(step, [HeldOutShare({"q": (total, tokens)}, {})])
        assert history.newest_is_best == (step in (0, 4))
    assert history.best["step"] == 4 and history.since_best == 2


def test_the_loss_of_several_sources_is_the_mean_over_their_tokens():
    shares = [HeldOutShare({"a": (4.0, 2), "b": (1.0, 5)}, {}), HeldOutShare({"a": (0.0, 0), "b": (1.0, 5)}, {})]
    found = HeldOutHistory().add(3, shares)
    assert found == {"step": 3, "loss": 0.5, "sources": {"a": 2.0, "b": 0.2}, "scores": {}}
    assert HeldOutHistory().add(0, [HeldOutShare({"a": (0.0, 0)}, {"a": (0.0, 0)})])["sources"] == {}


def test_the_result_names_the_first_the_last_and_the_best():
    history = HeldOutHistory()
    for step, total, right in ((0, 6.0, 1.0), (4, 2.0, 3.0), (8, 4.0, 2.0)):
        history.add(step, [HeldOutShare({"q": (total, 2)}, {"q": (right, 4)})])
    assert history.result(8, {"q": 7}, {"q": 4}) == {
        "first": 3.0, "last": 2.0, "best": 1.0, "best_step": 4, "checkpoint_step": 8, "rows": {"q": 7},
        "scores": {"q": {"first": 25.0, "last": 50.0, "questions": 4}},
    }  # fmt: skip


def test_a_state_has_the_held_out_loss_of_its_own_step_alone():
    history = HeldOutHistory()
    assert history.state(4) == {}
    history.add(4, [HeldOutShare({"q": (3.0, 2)}, {}), HeldOutShare({"q": (1.0, 6)}, {})])
    assert history.state(4)["held_out_loss"] == 0.5 and history.state(5)["held_out_loss"] is None
    assert [each["step"] for each in history.state(5)["evaluations"]] == [4]


def test_every_worker_draws_the_same_rows(settings_of, tmp_path):
    job, _ = resolve_job(settings_of(tmp_path), 4)
    whole = BatchMaker(job.plan)
    parts = [BatchMaker(job.plan.for_worker(rank, 2)) for rank in range(2)]
    assert [maker.sample_ids(3) for maker in parts] == [whole.sample_ids(3)] * 2


def test_sample_predictions_are_of_held_out_rows(settings_of, world, tmp_path):
    job, _ = resolve_job(settings_of(tmp_path), 4)
    predictor = SamplePredictor(BatchMaker(job.plan))
    maker = predictor.maker
    asked = {
        f"{maker.names[ref.source]}/{maker.shards[maker.names[ref.source]].row_id(ref.row)}" for ref in predictor.refs
    }
    assert asked and asked <= held_ids(world)
