"""The demo without its work: which phase gets what, in which order, what is asked over HTTP, and what is told."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

from jobs.demo import start_line
from pipelines import export
from pipelines.data import features
from pipelines.evaluation import run as evaluation
from pipelines.miniature import demo, world
from pipelines.serving import run as serving_run
from pipelines.settings import DemoSettings, ScoreSettings, TrainSettings
from pipelines.tracking import base as tracking
from pipelines.training import run as training
from tests.paths import ROOT
from tinygptv.data import drawing
from tinygptv.miniature import backbones

LOSSES = "".join(json.dumps({"step": n, "loss": float(n), "grad_norm": 1.0}) + "\n" for n in range(20))
REFERRED = {"image": "7.jpg", "sents": "the red star"}
QUESTIONS = [
    {"image": "6.jpg", "question": "wrong image?", "answer": "x"},
    {"image": "8.jpg", "question": "another one?", "answer": "z"},
    {"image": "7.jpg", "question": "what colour?", "answer": "red"},
    {"image": "7.jpg", "question": "second?", "answer": "y"},
]
TASKS = ["miniature_refer", "miniature_identify", "miniature_caption", "miniature_grounding", "miniature_conversation"]


@pytest.fixture
def done(monkeypatch):
    """What each phase is given, in order."""
    found = []

    def note(name, answer=None):
        def phase(*given, **options):
            found.append((name, *given, *([options] if options else [])))
            return answer(*given) if callable(answer) else answer

        return phase

    def stage(settings, number, parent_run_id):
        found.append(("stage", number, settings.init_from, settings.data, parent_run_id))
        folder = Path(settings.output)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(LOSSES)
        return {"first_loss": 10.0 + number, "last_loss": number / 2, "checkpoint": f"{folder}/checkpoint"}

    @contextlib.contextmanager
    def serve(settings):
        found.append(("serve", settings.artifact, settings.port))
        yield "http://served"
        found.append("served")

    @contextlib.contextmanager
    def ray(settings):
        found.append("ray")
        yield
        found.append("ray ends")

    monkeypatch.setattr(demo, "start_ray", ray)
    monkeypatch.setattr(backbones, "write_checkpoint", note("backbones", lambda folder: folder))
    monkeypatch.setattr(world, "draw_world", lambda settings: found.append(("world", settings.output)))
    monkeypatch.setattr(world, "prepare_world", note("prepare", 77))
    monkeypatch.setattr(
        features, "cache_features", lambda s: found.append(("features", s.checkpoint, s.data, s.output))
    )
    monkeypatch.setattr("pipelines.training.stage_features.cache_features", features.cache_features)
    monkeypatch.setattr(training, "run_stage", stage)
    closing = SimpleNamespace(run_id="parent", close=lambda: found.append("tracker ends"))
    monkeypatch.setattr(tracking, "continue_tracker", note("tracker", closing))

    def evaluate(settings):
        found.append(("score", settings.checkpoint, settings.data, settings.output, settings.benchmark, settings.limit))
        return {"benchmarks": {name: settings.limit for name in settings.benchmark}}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(
        export, "export", lambda s: found.append(("export", s.checkpoint, s.output, s.data)) or {"bytes": 5}
    )
    monkeypatch.setattr(serving_run, "serving", serve)
    monkeypatch.setattr(demo, "ask", note("ask", lambda address, image, text: f"answer to {text}"))
    monkeypatch.setattr(demo, "_draw_answer", note("draw", lambda *given: given[-1]))
    return found


def start(folder, questions=QUESTIONS, config="", **settings):
    (folder / "c.yaml").write_text(config)
    (folder / "out/world/benchmarks").mkdir(parents=True)
    (folder / "out/world/benchmarks/refer.json").write_text(json.dumps([REFERRED, {"image": "6.jpg", "sents": "x"}]))
    (folder / "out/world/benchmarks/vqa.json").write_text(json.dumps(questions))
    given = DemoSettings(output=str(folder / "out"), tracking_uri="none", port=9, **settings)
    return demo.run_demo(given, str(folder / "c.yaml"))


def test_each_phase_gets_what_the_one_before_made(done, tmp_path):
    result = start(tmp_path, config="score: {limit: 3}", quiet=True)
    out = tmp_path / "out"
    image = out / "world/benchmarks/images/7.jpg"
    located = "[refer] give me the location of the red star"
    scored = (f"{out}/stage4/checkpoint", f"{out}/world")
    stages = [("stage", n, f"{out}/stage{n - 1}/checkpoint", f"{out}/shards", "parent") for n in (2, 3, 4)]
    (prepared,) = [entry for entry in done if entry[0] == "prepare"]
    assert prepared[1:3] == (out / "world", out / "shards")
    assert prepared[3](source="x").tracking_uri == "none"
    (tracked,) = [entry for entry in done if entry[0] == "tracker"]
    assert tracked[2].startswith("mini training, ") and tracked[3] == out
    assert [entry for entry in done if entry not in (prepared, tracked)] == [
        ("backbones", out / "backbones"),
        ("world", f"{out}/world"),
        "ray",
        ("stage", 1, f"{out}/backbones", f"{out}/shards", "parent"),
        *stages,
        "tracker ends",
        ("score", *scored, f"{out}/score/vqa", ["miniature_vqa"], 15),  # five times the questions
        ("score", *scored, f"{out}/score/tasks", TASKS, 3),
        ("export", f"{out}/stage4/checkpoint", f"{out}/artifact", f"{out}/shards"),
        ("serve", f"{out}/artifact", 9),
        ("ask", "http://served", image, "[vqa] what colour?"),
        ("ask", "http://served", image, located),
        "served",
        ("draw", image, "the red star", f"answer to {located}", out / "answer.png"),
        "ray ends",
    ]
    assert done.index("ray") < done.index(prepared) < done.index(tracked) < done.index(stages[0])
    assert result["losses"][3] == {"first": 13.0, "last": 1.5, "first_tenth": 0.5, "last_tenth": 18.5}
    assert list(result["losses"]) == [1, 2, 3, 4] and result["rows"] == 77 and result["artifact"] == {"bytes": 5}
    assert result["checkpoint"] == f"{out}/stage4/checkpoint" and result["image"] == f"{out}/answer.png"
    assert result["question"] == {
        "question": "what colour?",
        "answer": "answer to [vqa] what colour?",
        "truth": "red",
    }
    assert result["refer"] == {"phrase": "the red star", "answer": f"answer to {located}"}
    assert result["scores"] == {"miniature_vqa": 15, **dict.fromkeys(TASKS, 3)}, "of both calls"
    assert result["result"] == f"{out}/result.json"
    written = json.loads((out / "result.json").read_text())
    assert written["hops"] == result["hops"] and "result" not in written and written["rows"] == 77
    assert 0 <= result["seconds"] < 60 and len(result["hops"]) == 9


def test_the_phases_are_announced_and_as_many_as_the_first_line_says(done, tmp_path, capsys):
    start(tmp_path, config=(ROOT / "configs/mini.yaml").read_text())
    titles = [line[3:] for line in capsys.readouterr().out.splitlines() if line.startswith("== ")]
    assert titles[:2] == ["draw the world", "prepare the data (Ray Data -> Arrow shards)"]
    assert [title for title in titles if title.startswith("stage")] == [
        "stage 1: warm-up",
        "stage 2: pre-training",
        "stage 3: human-like learning",
        "stage 4: multi-task learning",
    ]
    assert titles[-3:] == ["score on held-out scenes", "quantize", "serve and ask over HTTP"]
    assert ("compute query features" in titles) == any(entry[0] == "features" for entry in done)
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    assert start_line(DemoSettings()).startswith(f"The demo: {words[len(titles)]} phases, results in outputs/demo. ")
    assert "results in here." in start_line(DemoSettings(output="here"))


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_phase_has_its_section_of_the_configuration_and_what_the_demo_decides(tmp_path, overwrite):
    quiet = not overwrite
    (tmp_path / "c.yaml").write_text(f"train: {{seed: 3, quiet: {overwrite}}}\nscore: {{batch_size: 5}}")
    given = DemoSettings(quiet=quiet, tracking_uri="none", overwrite=overwrite)
    whole = demo.Demo(given, str(tmp_path / "c.yaml"), tmp_path)
    train, score = whole.load(TrainSettings, data="d", init_from="b"), whole.load(ScoreSettings)
    assert (train.seed, train.data, train.init_from, score.batch_size, score.data) == (3, "d", "b", 5, "")
    assert [(s.quiet, s.tracking_uri, s.overwrite) for s in (train, score)] == [(quiet, "none", overwrite)] * 2


def test_features_are_computed_where_stages_read_them(done, tmp_path):
    start(tmp_path, config="train: {features: cached}", quiet=True)
    out = tmp_path / "out"
    computed = [entry for entry in done if entry[0] == "features"]
    assert computed and set(computed) == {("features", f"{out}/backbones", f"{out}/shards", f"{out}/features")}
    assert done.index(computed[-1]) < [entry[0] for entry in done].index("stage")


def test_an_image_without_a_question_is_asked_for_its_box_alone(done, tmp_path):
    result = start(tmp_path, questions=QUESTIONS[:1], quiet=True)
    assert "question" not in result and [entry[0] for entry in done].count("ask") == 1


def test_a_question_is_asked_as_openais_clients_ask(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"jpeg")
    asked = []

    def post(url, **options):
        asked.append((url, options))
        status = 200 if len(asked) == 1 else 503
        content = {"choices": [{"message": {"content": "red"}}]}
        return httpx.Response(status, json=content, request=httpx.Request("POST", url))

    monkeypatch.setattr(demo.httpx, "post", post)
    assert demo.ask("http://a", tmp_path / "a.jpg", "what?") == "red"
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(b'jpeg').decode()}"}}
    content = [image, {"type": "text", "text": "what?"}]
    body = {"model": "tinygpt-v", "messages": [{"role": "user", "content": content}], "max_tokens": 64}
    assert asked == [("http://a/v1/chat/completions", {"json": body, "timeout": 120, "trust_env": False})]
    with pytest.raises(httpx.HTTPStatusError):
        demo.ask("http://a", tmp_path / "a.jpg", "what?")


@pytest.mark.parametrize(
    ("size", "drawn"), [((64, 32), (512, 256)), ((600, 100), (600, 100)), ((200, 256), (400, 512))]
)
def test_the_answer_is_drawn_on_a_large_copy(tmp_path, monkeypatch, size, drawn):
    Image.new("L", size).save(tmp_path / "a.png")
    seen = []
    monkeypatch.setattr(drawing, "draw_boxes", lambda image, text: seen.append((image.size, image.mode, text)) or image)
    target = demo._draw_answer(tmp_path / "a.png", "the star", "{<1><2><3><4>}", tmp_path / "b.png")
    assert seen == [(drawn, "RGB", "<p>the star</p> {<1><2><3><4>}")]
    assert target == tmp_path / "b.png" and Image.open(target).size == drawn


RESULT = {
    "losses": {1: {"first": 3.0, "last": 1.0, "first_tenth": 2.5004, "last_tenth": 1.25}},
    "scores": {},
    "question": {"question": "what colour?", "answer": "red", "truth": "blue"},
    "refer": {"phrase": "the star", "answer": "{<1>}"},
    "image": "/out/answer.png",
    "artifact": {"bytes": 12_345_678, "drift": 0.012},
    "seconds": 61.6,
    "result": "/out/result.json",
}


@pytest.mark.parametrize("asked", [True, False])
def test_the_summary_says_what_came_out(monkeypatch, asked):
    monkeypatch.setattr("pipelines.evaluation.scoring.score_table", lambda scores: "a\nb")
    given = RESULT if asked else {key: value for key, value in RESULT.items() if key != "question"}
    question = ["", "Asked over HTTP: what colour?", "Answer: red   (truth: blue)"]
    assert demo.summary(given).splitlines() == [
        "",
        "Losses, first -> last step of each stage (means of its first and last tenth):",
        "  stage 1: 3.000 -> 1.000  (2.500 -> 1.250)",
        "",
        "Scores on held-out scenes (blind: the same model with a blank image):",
        "  a",
        "  b",
        *(question if asked else []),
        "Asked for the box of 'the star': {<1>}",
        "The image with the drawn box: /out/answer.png",
        "Artifact: 12.3 MB, drift 0.012",
        "",
        "See the curves:   make mlflow   (opens http://127.0.0.1:5000)",
        "Talk to it:       make serve    (opens http://127.0.0.1:8000)",
        "Outputs: /out (total 62 s).",
        "/out/result.json",
    ]
