"""Units of questions: what their files are named by, what is answered again, and which view gets which image."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from pipelines.evaluation import run as run_module
from pipelines.evaluation import worker as worker_module
from pipelines.evaluation.answers import VIEWS, ViewAnswer
from pipelines.evaluation.benchmarks.base import Benchmark, Question
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.run import _answer_units, _check_images, _options, _read, _units, _used
from pipelines.evaluation.track import _worst_cases
from pipelines.evaluation.worker import AnswerOptions, QuestionUnit, UnitAnswerer
from pipelines.settings import ScoreSettings, SettingsError
from tests.serving_model import make_image
from tinygptv.data.prompt_layout import Exchange
from tinygptv.inference.batch import Prompt, Reply

OPTIONS = AnswerOptions("/model", "abc", 2, True, False, "/answers")
BENCHMARK = Benchmark("own", "m", lambda data: iter(()), lambda a, t: 0.0, 4)


def questions(folder, *names, **fields):
    return [Question(f"q{n}", "what?", name and folder / name, {}, **fields) for n, name in enumerate(names)]


@pytest.fixture
def images(tmp_path):
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        (tmp_path / name).write_bytes(make_image(seed))
    return tmp_path


def names(folder, options=OPTIONS, benchmark=BENCHMARK, asked=None):
    return [unit.file for unit in _units(options, benchmark, asked or questions(folder, "a.png", None))]


def test_units_have_four_batches_in_order(images):
    asked = questions(images, *[None] * 19)
    units = list(_units(OPTIONS, BENCHMARK, asked))
    assert [len(unit.questions) for unit in units] == [8, 8, 3] and [unit.number for unit in units] == [0, 1, 2]
    assert [question for unit in units for question in unit.questions] == asked
    assert len({unit.file for unit in units}) == 3 and units[1].file.startswith("own-00001-")
    assert {(unit.benchmark, unit.max_new_tokens, unit.generates) for unit in units} == {("own", 4, True)}
    ranked = replace(BENCHMARK, name="ranked", max_new_tokens=9, generates=False)
    (unit,) = _units(replace(OPTIONS, batch_size=5), ranked, asked[:20])
    assert (unit.benchmark, unit.number, unit.questions) == ("ranked", 0, tuple(asked))
    assert (unit.max_new_tokens, unit.generates) == (9, False)


def test_a_units_file_is_named_by_what_decides_its_answers(images):
    before = names(images)
    for changes in ({"fingerprint": "x"}, {"batch_size": 3}, {"baselines": False}, {"released": True}):
        assert names(images, replace(OPTIONS, **changes)) != before, changes
    for changes in ({"checkpoint": "/moved"}, {"answers_dir": "/moved"}, {"copies": (("s3://x", "/y"),)}):
        assert names(images, replace(OPTIONS, **changes)) == before, changes
    for changes in ({"max_new_tokens": 5}, {"generates": False}):
        assert names(images, benchmark=replace(BENCHMARK, **changes)) != before, changes
    for changes in ({"instruction": "x"}, {"choices": ("a",)}, {"image": None}):
        first, second = questions(images, "a.png", None)
        assert names(images, asked=[replace(first, **changes), second]) != before, changes
    (images / "elsewhere").mkdir()
    (images / "a.png").rename(images / "elsewhere/a.png")
    missing = names(images)
    moved = names(images, asked=questions(images / "elsewhere", "a.png", None))
    assert missing != before == moved, "a folder may be moved"
    stat = (images / "elsewhere/a.png").stat()
    os.utime(images / "elsewhere/a.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert names(images, asked=questions(images / "elsewhere", "a.png", None)) not in (before, missing), "overwritten"


class Model:
    """An ``Answerer`` whose image is its file's size, and whose answer says what it was asked with."""

    def __init__(self, losses=None, errors=()):
        self.losses, self.errors = losses or {}, errors

    def encode(self, images):
        return [f"image {index}" for index in range(len(images))]

    def blank(self):
        return "blank"

    def answer(self, prompts, embeds):
        return [
            Reply(error="too long") if prompt.instruction in self.errors else Reply(self._seen(prompt, embeds))
            for prompt in prompts
        ]

    def choice_losses(self, prompts, embeds):
        """A blank image costs 10 nats more."""
        more = 10.0 if embeds == ["blank"] else 0.0
        return [[self.losses.get(choice, 1.0) + more for choice in prompt.choices] for prompt in prompts]

    @staticmethod
    def _seen(prompt, embeds):
        return "no image" if prompt.image is None else embeds[prompt.image]


def answerer(model=None, **options):
    made = object.__new__(UnitAnswerer)
    made.options, made.moved, made.answerer = replace(OPTIONS, **options), {}, model or Model()
    return made


def unit(asked, generates=True):
    return QuestionUnit("own", 0, tuple(asked), 4, generates, "own-00000-x.jsonl")


def texts(found):
    return [tuple(each.views[view].text if view in each.views else None for view in VIEWS) for each in found]


def test_every_view_has_its_image(images):
    asked = questions(images, "a.png", None, "b.png", "a.png", "gone.png")
    found = answerer().answers(unit(asked))
    assert texts(found)[:4] == [
        ("image 0", "blank", "image 1"),
        ("no image",) * 3,
        ("image 1", "blank", "image 0"),
        ("image 0", "blank", "image 1"),
    ]
    assert found[4].views == {} and "gone.png cannot be opened" in found[4].problem
    assert [each.problem for each in found[:4]] == [""] * 4
    assert texts(answerer(baselines=False).answers(unit(asked[:2]))) == [
        ("image 0", None, None),
        ("no image", None, None),
    ]
    assert texts(answerer().answers(unit(asked[:2]))) == [("image 0", "blank", None), ("no image",) * 2 + (None,)]
    assert texts(answerer().answers(unit(asked[1:2]))) == [("no image", None, None)], "nothing to be blind for"


def test_a_question_is_asked_with_its_turns_its_choices_and_the_image_of_each_view(images):
    before = (Exchange("before?", "yes"),)
    asked = [
        Question("q0", "one?", images / "b.png", {}, history=before, choices=("x", "y")),
        Question("q1", "gone?", images / "gone.png", {}, choices=("x", "y")),
        Question("q2", "two?", None, {}, choices=("z", "x")),
        Question("q3", "three?", images / "a.png", {}, choices=("w", "y")),
    ]
    seen = []

    class Noting(Model):
        def choice_losses(self, prompts, embeds):
            seen.append((prompts, embeds))
            return super().choice_losses(prompts, embeds)

    answerer(Noting()).answers(replace(unit(asked, generates=False), max_new_tokens=7))

    def prompts(first, last):
        return [
            Prompt("one?", first, before, 7, ("x", "y")),
            Prompt("two?", None, (), 7, ("z", "x")),
            Prompt("three?", last, (), 7, ("w", "y")),
        ]

    own = ["image 0", "image 1"]
    assert seen == [(prompts(0, 1), own), (prompts(0, 0), ["blank"]), (prompts(1, 0), own)]


def test_an_image_is_opened_once_where_this_machine_has_it_and_named_as_the_driver_does(images):
    """A unit of a bucket's data: the questions name the driver's copy, the actor reads its own."""
    one = answerer()
    one.moved = {"/other": Path("/nowhere"), "/driver/copy": images}
    encoded = []
    one.answerer.encode = lambda found: encoded.append([image.size for image in found]) or ["first", "second"]
    (images / "wide.png").write_bytes(make_image(0, 30, 10))
    names = ("wide.png", "a.png", "gone.png", "wide.png")
    asked = [Question(f"q{n}", "what?", Path("/driver/copy") / name, {}) for n, name in enumerate(names)]
    found = one.answers(unit(asked))
    assert texts(found)[:2] == [("first", "blank", "second"), ("second", "blank", "first")]
    with Image.open(images / "a.png") as image:
        assert encoded == [[(30, 10), image.size]]
    assert found[2].problem.startswith("/driver/copy/gone.png cannot be opened: ") and found[2].views == {}
    assert [each.id for each in found] == ["q0", "q1", "q2", "q3"] and texts(found)[3] == texts(found)[0]


def test_units_shuffle_their_images_apart(images):
    for name in "defgh":
        (images / f"{name}.png").write_bytes(make_image(ord(name)))
    asked = questions(images, *(f"{name}.png" for name in "abcdefgh"))
    seen = []
    for number in range(3):
        found = answerer().answers(replace(unit(asked), number=number))
        seen.append(tuple(each.views["shuffled"].text for each in found))
        assert all(text != f"image {own}" for own, text in enumerate(seen[-1]))
        again = answerer().answers(replace(unit(asked), number=number))
        assert tuple(each.views["shuffled"].text for each in again) == seen[-1], "the same settings, the same images"
    assert len(set(seen)) == 3


def test_ranked_choices_keep_their_losses_beside_the_text(images):
    asked = questions(images, None, choices=("red", "blue", "green"))
    model = Model({"red": 3.0, "blue": 0.5, "green": math.inf})
    (ranked,) = answerer(model).answers(unit(asked, generates=False))
    assert ranked.views == {"answer": ViewAnswer("blue", (3.0, 0.5, math.inf))} and ranked.problem == ""
    (both,) = answerer(model).answers(unit(asked))
    assert both.views == {"answer": ViewAnswer("no image", (3.0, 0.5, math.inf))}
    (seen,) = answerer(model).answers(unit(questions(images, "a.png", choices=("red", "blue"))))
    assert seen.views == {"answer": ViewAnswer("image 0", (3.0, 0.5)), "blind": ViewAnswer("blank", (13.0, 10.5))}


def test_the_first_problem_of_a_question_stays(images):
    asked = [
        replace(questions(images, None, choices=("red", "blue"))[0], instruction=text) for text in ("long", "fine")
    ]
    model = Model({"red": math.inf, "blue": math.inf}, errors=("long",))
    found = answerer(model).answers(unit(asked))
    assert all(each.problem.startswith("no choice has a finite loss") for each in found)
    (too_long,) = answerer(Model(errors=("long",))).answers(unit(asked[:1]))
    assert too_long.problem == "too long"


def test_an_answered_unit_is_left_as_it_is(images, monkeypatch, tmp_path):
    one, written = answerer(answers_dir=str(tmp_path)), []
    monkeypatch.setattr(worker_module, "write_answers", lambda *given: written.append(given))
    monkeypatch.setattr(UnitAnswerer, "answers", lambda self, unit: f"answers of {unit.number}")
    one(replace(unit([]), number=3))
    assert written == [(str(tmp_path / "own-00000-x.jsonl"), "answers of 3")]
    (tmp_path / "own-00000-x.jsonl").write_text("")
    one(replace(unit([]), number=3))
    assert len(written) == 1


@pytest.mark.parametrize(("threads", "told"), [(0, []), (3, [3])])
def test_an_actor_loads_its_copy_of_the_checkpoint_and_knows_its_copies_of_the_data(monkeypatch, threads, told):
    asked, set_to = [], []
    monkeypatch.setattr(worker_module.torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(worker_module, "local_checkpoint", lambda uri: f"copy of {uri}")
    monkeypatch.setattr(worker_module, "local_data", lambda uri: f"copy of {uri}")
    monkeypatch.setattr(
        worker_module, "load_for_inference", lambda *given: asked.append(given) or ("model", "processor")
    )
    monkeypatch.setattr(worker_module, "Answerer", lambda *given, **more: (*given, more))
    options = replace(OPTIONS, checkpoint="s3://c", batch_size=7, released=True, copies=(("s3://d", "/driver"),))
    made = UnitAnswerer(options, threads, "cuda")
    assert (asked, set_to, made.options) == ([("copy of s3://c", "cuda")], told, options)
    assert made.moved == {"/driver": "copy of s3://d"}
    assert made.answerer == ("model", "processor", 7, {"released": True})
    assert UnitAnswerer(options).answerer[-1] == {"released": True} and asked[-1][1] == "cpu"
    assert set_to == told, "without a number torch keeps its own"


def test_images_of_a_bucket_are_read_from_this_machines_copy(tmp_path):
    one = answerer()
    one.moved = {"/driver/copy": tmp_path}
    assert one._here(Path("/driver/copy/val/a.png")) == tmp_path / "val/a.png"
    assert one._here(Path("/driver/other/a.png")) == Path("/driver/other/a.png")


# ---------------------------------------------------------------------- what the driver does


def test_options_are_those_of_the_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "checkpoint_digest", lambda path: "digest")
    data = DataFolder(tmp_path / "copy", tmp_path / "images")
    settings = ScoreSettings(
        checkpoint="/model", data="s3://bucket/x", images=str(tmp_path), batch_size=3, baselines=False, metric="exact"
    )
    found = _options(settings, tmp_path, data, str(tmp_path / "answers"))
    assert (found.batch_size, found.baselines, found.fingerprint, found.checkpoint) == (3, False, "digest", "/model")
    assert found.copies == (("s3://bucket/x", str(tmp_path / "copy")),), "what is local is read where it lies"
    assert found.answers_dir == str(tmp_path / "answers") and (tmp_path / "answers").is_dir()
    both = settings.model_copy(update={"images": "s3://bucket/y"})
    copies = {"s3://bucket/x": str(tmp_path / "copy"), "s3://bucket/y": str(tmp_path / "images")}
    assert dict(_options(both, tmp_path, data, str(tmp_path / "answers")).copies) == copies
    assert [
        _options(settings.model_copy(update={"metric": metric}), tmp_path, data, str(tmp_path / "answers")).released
        for metric in ("official", "released", "exact", "vqa", "iou")
    ] == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("changes", "threads", "device"),
    [
        ({"num_workers": 0}, 0, "cpu"),
        ({"num_workers": 2}, 4, "cpu"),
        ({"num_workers": 16}, 1, "cpu"),
        ({"num_workers": 2, "threads_per_worker": 3, "gpus_per_worker": 0.5}, 3, "cuda"),
    ],
)
def test_actors_share_the_cores(monkeypatch, changes, threads, device):
    made = []
    monkeypatch.setattr(run_module.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(
        run_module, "map_units", lambda setup, units, workers, settings, name: made.append((setup, workers)) or []
    )
    _answer_units(ScoreSettings(quiet=True, **changes), OPTIONS, [])
    ((setup, workers),) = made
    assert setup.args == (OPTIONS, threads, device)
    assert (workers.count, workers.num_gpus) == (changes["num_workers"], changes.get("gpus_per_worker", 0))


def test_one_image_that_exists_is_enough(images):
    data = DataFolder(images)
    _check_images("own", questions(images, "gone.png", "a.png"), data)
    _check_images("own", questions(images, None, None), data)
    with pytest.raises(SettingsError, match=r"none of the first 2 images exists; the first, x\.png"):
        _check_images("own", questions(images, "x.png", "y.png"), data)
    with pytest.raises(SettingsError, match="has no questions"):
        _check_images("own", [], data)


def test_files_of_a_benchmark_are_its_own(tmp_path):
    data = DataFolder(tmp_path)
    data.opened.append(SimpleNamespace(used=[tmp_path / "of another"], looked_in=[]))

    def read(data):
        data.opened.append(SimpleNamespace(used=[tmp_path / "own"], looked_in=[]))
        return iter(questions(tmp_path, None))

    found = _read(ScoreSettings(), replace(BENCHMARK, read=read), data)
    assert found.files == [tmp_path / "own"] == _used(data)
    assert found.questions == questions(tmp_path, None)


def test_the_worst_cases_with_an_image_are_tracked(images):
    def case(number, score, image="a.png"):
        return {
            "benchmark": "own", "id": str(number), "instruction": "x", "answer": str(number), "truth": {"answer": "a"},
            "score": score, "blind": None, "shuffled": None, "blind_score": None,
            "image": image and str(images / image),
        }  # fmt: skip

    lines = [case(n, n / 100) for n in reversed(range(30))] + [case(99, 0.0, None)]
    rows = _worst_cases(lines)
    assert [row["answer"] for row in rows] == [str(n) for n in range(24)]
    assert [rows[1][name] for name in ("score", "instruction", "blind")] == [0.01, "x", "null"], "numbers stay numbers"
    assert rows[0]["truth"] == '{"answer": "a"}' and rows[0]["blind"] == "null" and max(rows[0]["image"].size) == 224
