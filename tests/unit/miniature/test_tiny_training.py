"""Small trainings for tests: their rows, and the command line that stands for the same settings."""

from __future__ import annotations

import json

from pipelines.data.shard_format import MANIFEST
from pipelines.miniature import tiny_training
from pipelines.miniature.tiny_training import (
    as_words,
    command_changes,
    command_line,
    make_rows,
    make_world,
    train_settings,
)
from pipelines.settings import TrainSettings
from tinygptv.miniature.draw import encode_jpeg
from tinygptv.miniature.scenes import make_scene


def test_the_command_line_gives_the_same_settings(tmp_path):
    world = {"data": "/data set", "init_from": "/start"}
    words = command_line(world, tmp_path, 3, num_workers=2)
    direct = train_settings(world, tmp_path, quiet=False, **command_changes(3), num_workers=2)
    assert TrainSettings.from_command_line(words, "") == direct
    assert as_words(TrainSettings()) == [] and as_words(TrainSettings(seed=3, data="a b")) == ["seed=3", "data=a b"]
    assert direct.stage["schedule"] == {**direct.stage["schedule"], "epochs": 3, "steps_per_epoch": 6}
    assert direct.stage["sources"] == {"pairs": {"weight": 1, "batch_size": 4}} and direct.num_workers == 2


def test_every_fourth_question_has_no_image():
    pairs, questions = make_rows("pairs", 5), make_rows("questions", 8)
    assert [row.id for row in pairs] == [f"p{n}" for n in range(5)] and {row.task for row in pairs} == {"pair"}
    assert [row.task for row in questions] == ["vqa", "vqa", "vqa", "text"] * 2
    assert all(bool(row.image) == (row.task != "text") for row in (*pairs, *questions))
    assert {row.source for row in questions} == {"questions"} and make_rows("pairs", 5) == pairs


def test_rows_have_their_words_and_the_size_of_their_scene():
    pairs, questions = make_rows("pairs", 3), make_rows("questions", 8)
    for number, row in enumerate(pairs):
        scene = make_scene(3, "train", number)
        assert (row.width, row.height, row.image) == (scene.width, scene.height, encode_jpeg(scene))
        ((question, (words,)),) = [(turn.question, turn.answers) for turn in row.turns]
        assert question == "" and set(words.split()) <= {"red", "blue", "dog", "cat", "big"}
    said = [(turn.question, turn.answers) for row in questions for turn in row.turns]
    for number, (question, (words, *others)) in enumerate(said):
        text_only = number in (3, 7)
        assert (question, others) == ((f"say {words}", []) if text_only else ("what?", ["yes"]))
    assert len({answers[0] for _, answers in said}) > 4, "they are told apart by their words"


def test_a_training_of_seconds_has_two_short_epochs_and_saves_within_them(tmp_path):
    world = {"data": "/d", "init_from": "/s"}
    found = train_settings(world, tmp_path, seed=4, stage={"lora_rank": 0})
    assert found.model_dump(exclude_defaults=True) == {
        "tracking_uri": "none", "quiet": True, "num_workers": 0, "loader_workers": 0, "checkpoint_every": 3,
        "micro_batch_size": 8, "threads_per_worker": 1, "log_every": 2, "seed": 4, "output": str(tmp_path), **world,
        "stage": {**tiny_training.STAGE, "lora_rank": 0},
    }  # fmt: skip
    assert train_settings(world, tmp_path).stage == tiny_training.STAGE, "no run changes another's"


def test_a_world_is_two_shard_sets_and_a_start(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(tiny_training, "save_checkpoint", lambda *given: saved.append(given))
    world = make_world(tmp_path, rows=9)
    assert world == {"data": f"{tmp_path}/shards", "init_from": f"{tmp_path}/start"}
    for source, rows in (("pairs", [8, 1]), ("questions", [8, 8, 6])):
        manifest = json.loads((tmp_path / "shards" / source / MANIFEST).read_text())
        assert [(shard["file"], shard["rows"]) for shard in manifest["shards"]] == [
            (f"part-{number:05d}.arrow", count) for number, count in enumerate(rows)
        ]
        assert sorted(path.name for path in (tmp_path / "shards" / source).iterdir()) == sorted(
            [MANIFEST, *(f"part-{number:05d}.arrow" for number in range(len(rows)))]
        )
    ((folder, model, processor, metadata),) = saved
    assert (folder, metadata) == (tmp_path / "start", {"title": "test start"})
    assert not model.config.lora_rank and len(processor.tokenizer) == 256
