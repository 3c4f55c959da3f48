"""The whole pipeline in one command, on the miniature: draw, prepare, train four stages, score, quantize, serve, ask.

Every phase is the one that its own job runs; this file only calls them in order. Finished phases are recognised and
skipped, so that a second run goes straight to the answers.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import httpx

from pipelines.cluster import start_ray
from pipelines.json_files import write_json
from pipelines.settings import (
    CacheFeaturesSettings,
    DemoSettings,
    MiniatureSettings,
    PrepareDataSettings,
    QuantizeSettings,
    ScoreSettings,
    ServeSettings,
    Settings,
    TrainSettings,
)
from pipelines.training.record import read_record
from tinygptv.training.stages import RECIPES

if TYPE_CHECKING:
    from pipelines.evaluation.scoring import BenchmarkScore
    from pipelines.export import ExportResult


class MeanLosses(TypedDict):
    """Mean losses of a stage's first and last tenth of steps, in nats per token."""

    first_tenth: float
    last_tenth: float


class StageLosses(MeanLosses):
    """And those of its first and last step."""

    first: float
    last: float


class AskedQuestion(TypedDict):
    """A question that was asked over HTTP, and its true answer."""

    question: str
    answer: str
    truth: str


class LocatedPhrase(TypedDict):
    """A phrase whose box was asked for over HTTP."""

    phrase: str
    answer: str


class DemoResult(TypedDict):
    """``result.json`` of the demo.

    Attributes:
        rows: of all shard sets.
        losses: of each stage, by its number.
        checkpoint: of the last stage.
        scores: by benchmark.
        artifact: result of the export.
        question: asked over HTTP.
        refer: phrase whose box was asked for.
        image: path of the image with that box.
        hops: seconds of each phase, by title.
        seconds: of the run.
        result: path of the file.
    """

    rows: int
    losses: dict[int, StageLosses]
    checkpoint: str
    scores: dict[str, BenchmarkScore]
    artifact: ExportResult
    question: NotRequired[AskedQuestion]
    refer: LocatedPhrase
    image: str
    hops: dict[str, float]
    seconds: float
    result: str


@dataclass
class Demo:
    """The state of one run of the demo.

    Attributes:
        settings: of the demo.
        config: the configuration file; every phase reads its own section.
        root: folder of all results.
        result: content of the demo's ``result.json`` so far.
        seconds: duration of each phase, by its title (``hops`` in ``result.json``).
    """

    settings: DemoSettings
    config: str | None
    root: Path
    result: DemoResult = field(default_factory=lambda: cast(DemoResult, {}))
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Announce a phase and time it."""
        if not self.settings.quiet:
            print(f"\n== {title}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - started, 1)

    def load(self, kind: type[Settings], **fields: Any) -> Any:
        """Settings of a phase: its section of the configuration, and what the demo decides."""
        common = {
            **self.settings.given_beside(self.config),
            "quiet": self.settings.quiet,
            "tracking_uri": self.settings.tracking_uri,
        }
        if "overwrite" in kind.model_fields and self.settings.overwrite:
            common["overwrite"] = True
        loaded = kind.load(self.config)
        return kind.parse({**loaded.model_dump(), **common, **fields}, "the demo")


def run_demo(settings: DemoSettings, config: str | None) -> DemoResult:
    """Run the whole pipeline.

    Args:
        settings: port, output folder.
        config: configuration file of all phases.

    Returns:
        Losses, scores, the answer and the output paths; also written to ``result.json``.
    """
    started = time.perf_counter()
    demo = Demo(settings, config, settings.output_dir("outputs/demo"))
    world, backbones = _draw(demo)
    with start_ray(demo.load(TrainSettings)):
        shards = _prepare(demo, world)
        checkpoint = _train(demo, shards, backbones)
        _score(demo, checkpoint, world)
        artifact = _quantize(demo, checkpoint)
        _ask(demo, artifact, world)
    demo.result["hops"] = demo.seconds
    demo.result["seconds"] = round(time.perf_counter() - started, 1)
    path = demo.root / "result.json"
    write_json(path, demo.result)
    return {**demo.result, "result": str(path)}


def _draw(demo: Demo) -> tuple[Path, Path]:
    """Shipped backbones as a checkpoint folder, and the world's data sets."""
    from pipelines.miniature.world import draw_world
    from tinygptv.miniature.backbones import write_checkpoint

    with demo.phase("draw the world"):
        backbones = write_checkpoint(demo.root / "backbones")
        world = demo.root / "world"
        draw_world(demo.load(MiniatureSettings, output=str(world)))
    return world, backbones


def _prepare(demo: Demo, world: Path) -> Path:
    """Every source of the recipe as an Arrow shard set."""
    from pipelines.miniature.world import prepare_world

    shards = demo.root / "shards"
    with demo.phase("prepare the data (Ray Data -> Arrow shards)"):
        settings = partial(demo.load, PrepareDataSettings, tracking_uri="none")
        demo.result["rows"] = prepare_world(world, shards, settings)
    return shards


def _train(demo: Demo, shards: Path, backbones: Path) -> Path:
    """Stages 1 to 4, each from the checkpoint of the one before."""
    from pipelines.tracking.base import continue_tracker
    from pipelines.tracking.described import run_title
    from pipelines.training.record import RECORD_FILE
    from pipelines.training.run import run_stage

    settings = demo.load(TrainSettings)
    if settings.features == "cached":
        _cache_features(demo, shards, backbones)
    parent = continue_tracker(settings, run_title(settings.recipe, "training"), demo.root)
    start = str(backbones)
    losses: dict[int, StageLosses] = {}
    for stage in RECIPES[settings.recipe]:
        output = demo.root / f"stage{stage.number}"
        with demo.phase(f"stage {stage.number}: {stage.title}"):
            fields = {"data": str(shards), "init_from": start, "output": str(output)}
            result = run_stage(demo.load(TrainSettings, **fields), stage.number, parent_run_id=parent.run_id)
        losses[stage.number] = {
            "first": result["first_loss"],
            "last": result["last_loss"],
            **mean_losses(output / RECORD_FILE),
        }
        start = result["checkpoint"]
    parent.close()
    demo.result["losses"] = losses
    demo.result["checkpoint"] = start
    return Path(start)


def _cache_features(demo: Demo, shards: Path, backbones: Path) -> None:
    """Query features of the frozen encoder, which no stage changes."""
    from pipelines.training.stage_features import cache_stage_features

    fields = {"data": str(shards), "checkpoint": str(backbones), "output": str(demo.root / "features")}
    with demo.phase("compute query features"):
        stages = RECIPES[demo.load(TrainSettings).recipe]
        cache_stage_features(stages, partial(demo.load, CacheFeaturesSettings, **fields))


def mean_losses(record: Path) -> MeanLosses:
    """Mean loss of a stage's first and last tenth of steps: the samples of a single step vary too much."""
    losses = [entry["loss"] for entry in read_record(record)]
    tenth = max(1, len(losses) // 10)
    return {"first_tenth": sum(losses[:tenth]) / tenth, "last_tenth": sum(losses[-tenth:]) / tenth}


def _score(demo: Demo, checkpoint: Path, world: Path) -> None:
    """Short answers on many scenes, the longer tasks on fewer."""
    from pipelines.evaluation.benchmarks import GROUPS
    from pipelines.evaluation.run import evaluate

    few = demo.load(ScoreSettings).limit
    limits = {
        "vqa": (["miniature_vqa"], 5 * few),
        "tasks": ([n for n in GROUPS["miniature"] if n != "miniature_vqa"], few),
    }
    demo.result["scores"] = {}
    with demo.phase("score on held-out scenes"):
        for part, (names, limit) in limits.items():
            fields = {"checkpoint": str(checkpoint), "data": str(world), "output": str(demo.root / "score" / part)}
            settings = demo.load(ScoreSettings, benchmark=names, limit=limit, **fields)
            demo.result["scores"] |= evaluate(settings)["benchmarks"]


def _quantize(demo: Demo, checkpoint: Path) -> Path:
    from pipelines.export import export

    with demo.phase("quantize"):
        artifact = demo.root / "artifact"
        fields = {"checkpoint": str(checkpoint), "output": str(artifact), "data": str(demo.root / "shards")}
        demo.result["artifact"] = export(demo.load(QuantizeSettings, **fields))
    return artifact


def _ask(demo: Demo, artifact: Path, world: Path) -> None:
    """Serve the artifact and ask over HTTP: a question, and the box of a phrase."""
    from pipelines.serving.run import serving

    entry = json.loads((world / "benchmarks/refer.json").read_text())[0]
    asked = [e for e in json.loads((world / "benchmarks/vqa.json").read_text()) if e["image"] == entry["image"]]
    image = world / "benchmarks/images" / entry["image"]
    with demo.phase("serve and ask over HTTP"):
        settings = demo.load(ServeSettings, artifact=str(artifact), port=demo.settings.port)
        with serving(settings) as address:
            for question in asked[:1]:
                answer = ask(address, image, f"[vqa] {question['question']}")
                demo.result["question"] = {
                    "question": question["question"],
                    "answer": answer,
                    "truth": question["answer"],
                }
            located = ask(address, image, f"[refer] give me the location of {entry['sents']}")
        demo.result["refer"] = {"phrase": entry["sents"], "answer": located}
    demo.result["image"] = str(_draw_answer(image, entry["sents"], located, demo.root / "answer.png"))


def ask(address: str, image: Path, text: str) -> str:
    """One question about an image, through the HTTP endpoint."""
    url = "data:image/jpeg;base64," + base64.b64encode(image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": "tinygpt-v", "messages": [{"role": "user", "content": content}], "max_tokens": 64}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


def _draw_answer(path: Path, phrase: str, answer: str, target: Path) -> Path:
    from PIL import Image

    from tinygptv.data.drawing import draw_boxes

    image = Image.open(path).convert("RGB")
    scale = max(1, 512 // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    draw_boxes(image, f"<p>{phrase}</p> {answer}").save(target)
    return target


def summary(result: DemoResult) -> str:
    """The closing summary."""
    from pipelines.evaluation.scoring import score_table

    lines = ["", "Losses, first -> last step of each stage (means of its first and last tenth):"]
    for number, loss in result["losses"].items():
        means = f"{loss['first_tenth']:.3f} -> {loss['last_tenth']:.3f}"
        lines.append(f"  stage {number}: {loss['first']:.3f} -> {loss['last']:.3f}  ({means})")
    lines += ["", "Scores on held-out scenes (blind: the same model with a blank image):"]
    lines += [f"  {line}" for line in score_table(result["scores"]).splitlines()]
    if "question" in result:
        asked = result["question"]
        lines += ["", f"Asked over HTTP: {asked['question']}", f"Answer: {asked['answer']}   (truth: {asked['truth']})"]
    lines += [f"Asked for the box of {result['refer']['phrase']!r}: {result['refer']['answer']}"]
    root = Path(result["result"]).parent
    lines += [
        f"The image with the drawn box: {result['image']}",
        f"Artifact: {result['artifact']['bytes'] / 1e6:.1f} MB, drift {result['artifact']['drift']}",
        "",
        "See the curves:   make mlflow   (opens http://127.0.0.1:5000)",
        "Talk to it:       make serve    (opens http://127.0.0.1:8000)",
        f"Outputs: {root} (total {result['seconds']:.0f} s).",
        result["result"],
    ]
    return "\n".join(lines)
