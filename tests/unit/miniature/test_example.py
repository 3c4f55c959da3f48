"""The example of one's own data: a colour that the world lacks, rows that every job reads."""

from __future__ import annotations

import json

import pytest

from pipelines.data.ingest.job import ingest
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.benchmarks.own import own_benchmark
from pipelines.fingerprint import OtherInputsError
from pipelines.miniature import example as example_module
from pipelines.miniature.example import NEW_COLOUR, _box, _colours, _scene
from pipelines.miniature.jobs import run_miniature
from pipelines.settings import MiniatureSettings, PrepareDataSettings
from tinygptv.data.processing import load_tokenizer
from tinygptv.miniature.backbones import BACKBONES
from tinygptv.miniature.scenes import COLOURS, generator


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    output = tmp_path_factory.mktemp("example") / "new_colour"
    settings = MiniatureSettings(task="example", output=str(output), example_scenes=6, tracking_uri="none")
    return run_miniature(settings), output


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_a_new_colour(example):
    result, output = example
    names = ("train", "test", "test_known", "test_boxes")
    train, test, known, boxes = (rows(output / f"{name}.jsonl") for name in names)
    assert NEW_COLOUR not in COLOURS and result["rows"]["train.jsonl"] == len(train) >= 18
    assert {row["task"] for row in train} == {"vqa", "refer", "identify"}
    assert not {row["image"] for row in train} & {row["image"] for row in (*test, *known, *boxes)}
    assert all((output / row["image"]).is_file() for row in (*train, *test, *known, *boxes))
    assert {row["answer"] for row in test} == {NEW_COLOUR} and 8 <= len(test) <= 12, "one object of each scene"
    assert {row["answer"] for row in known} <= set(COLOURS) and len(boxes) == 12


def test_the_other_things_of_a_scene_are_asked_about_too(example):
    """Else the model learns that such images are about the new colour whatever is asked."""
    train = rows(example[1] / "train.jsonl")
    answers = [row["answer"] for row in train if "answer" in row]
    others = [answer for answer in answers if answer != NEW_COLOUR]
    assert set(others) <= set(COLOURS) and len(others) >= len(answers) / 4
    phrases = [row["turns"][0]["answers"][0] for row in train if "turns" in row]
    assert any(NEW_COLOUR not in phrase for phrase in phrases), "boxes of other things"
    assert len({row["image"] for row in train}) == 6


def test_the_new_word_can_be_spelled():
    """Of six tokens the frozen language model learns the beginning only."""
    tokenizer = load_tokenizer(BACKBONES)
    assert len(tokenizer.tokenize(NEW_COLOUR)) <= 3 and len(tokenizer.tokenize(f" {NEW_COLOUR}")) <= 3


def test_every_row_is_kept_by_the_ingest(example, tmp_path):
    fields = {"source": "jsonl", "input": str(example[1] / "train.jsonl"), "name": "aqua"}
    common = {"output": str(tmp_path), "num_workers": 0, "tracking_uri": "none", "quiet": True}
    result = ingest(PrepareDataSettings(**fields, **common))
    assert (result["rows_out"], result["quarantined"]) == (example[0]["rows"]["train.jsonl"], 0)


@pytest.mark.parametrize(
    ("file", "metric"),
    [("test.jsonl", "exact match"), ("test_known.jsonl", "exact match"), ("test_boxes.jsonl", "IoU > 0.5")],
)
def test_every_held_out_row_is_asked(example, file, metric):
    data = DataFolder(example[1] / file)
    benchmark = own_benchmark("official", data)
    assert benchmark.metric == metric and len(list(benchmark.read(data))) == example[0]["rows"][file]


def test_the_same_again_and_another(example):
    output = example[1]
    settings = MiniatureSettings(task="example", output=str(output), example_scenes=6, tracking_uri="none")
    before = (output / "train.jsonl").read_bytes()
    run_miniature(settings)
    assert (output / "train.jsonl").read_bytes() == before
    with pytest.raises(OtherInputsError, match="scenes was 6, is now 7"):
        run_miniature(settings.model_copy(update={"example_scenes": 7}))


def test_one_object_of_a_scene_has_the_new_colour_and_its_phrase_and_box_are_its_own():
    for index in range(20):
        scene = _scene(0, index)
        item, *others = scene.objects
        assert item.colour == NEW_COLOUR and NEW_COLOUR not in {other.colour for other in others}
        (row,) = _box("a.jpg", scene, 0, "refer", generator(scene.key, "example"))
        assert row["turns"][0]["answers"] == [f"{NEW_COLOUR} {item.shape}"]
        assert row["boxes"] == [[round(corner, 1) for corner in scene.pixel_box(item)]]


def test_each_other_object_has_its_own_phrase_and_box_or_none(monkeypatch):
    monkeypatch.setattr(
        example_module, "refer_to", lambda objects, index, rng, **_: f"words {index}" if index % 2 else None
    )
    for number in range(5):
        scene = _scene(0, number)
        for index, item in enumerate(scene.objects):
            found = list(_box("a.jpg", scene, index, "identify", generator(scene.key, "example")))
            if index == 0:
                continue
            if index % 2 == 0:
                assert found == [], "no words tell it apart"
                continue
            box = [round(corner, 1) for corner in scene.pixel_box(item)]
            turns = [{"question": "", "answers": [f"words {index}"]}]
            assert found == [{"image": "a.jpg", "turns": turns, "boxes": [box], "task": "identify"}]


def test_colours_are_asked_of_what_words_tell_apart_without_them(monkeypatch):
    hidden = []

    def refer_to(objects, index, rng, hide):
        hidden.append(hide)
        return None if index == 0 else f"thing {index}"

    monkeypatch.setattr(example_module, "refer_to", refer_to)
    scene = _scene(0, 3)
    found = list(_colours("a.jpg", scene, None, "colour of {x}?"))
    assert found == [
        {"image": "a.jpg", "question": f"colour of thing {n}?", "answer": item.colour, "task": "vqa"}
        for n, item in enumerate(scene.objects)
        if n
    ]
    assert set(hidden) == {("colour",)}


def test_what_is_written_of_each_scene(tmp_path, monkeypatch):
    """Twice as many images to score as to learn from, of other scenes than those of the backbones' pretraining."""
    drawn = []
    make = example_module._scene
    monkeypatch.setattr(example_module, "_scene", lambda seed, index: drawn.append((seed, index)) or make(seed, index))
    settings = MiniatureSettings(task="example", output=str(tmp_path), example_scenes=2, seed=3, tracking_uri="none")
    result = example_module.draw_example(settings)
    assert drawn == [(3, 10_000 + number) for number in range(6)] and result["folder"] == str(tmp_path)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"{n:03d}.jpg" for n in range(6)]
    assert result["rows"] == {f"{name}.jsonl": len(rows(tmp_path / f"{name}.jsonl")) for name in NAMES}
    train = {row["image"] for row in rows(tmp_path / "train.jsonl")}
    assert train == {"images/000.jpg", "images/001.jpg"}
    assert [row["image"] for row in rows(tmp_path / "test_boxes.jsonl")] == [f"images/{n:03d}.jpg" for n in range(2, 6)]
    assert {row["task"] for row in rows(tmp_path / "test_boxes.jsonl")} == {"refer"}


NAMES = ("train", "test", "test_known", "test_boxes")
