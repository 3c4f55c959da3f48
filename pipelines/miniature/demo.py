"""The whole way in one command, on the miniature: draw, prepare, train four stages, score, shrink, serve, ask.

Every hop is the one that its own job runs; this file only walks from one to the next. Finished hops are recognised and
not done again, so a second run goes straight to the answers.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pipelines.cluster import start_ray
from pipelines.settings import (
    CacheFeaturesSettings,
    DemoSettings,
    PrepareDataSettings,
    QuantizeSettings,
    ScoreSettings,
    ServeSettings,
    TrainSettings,
)
from tinygptv.training.stages import RECIPES


@dataclass
class Demo:
    """What the walk has found so far.

    Attributes:
        settings: of the demo.
        config: the configuration file that every hop reads its own section of.
        root: folder of all results.
        facts: what the closing summary tells.
    """

    settings: DemoSettings
    config: str | None
    root: Path
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def hop(self, title: str) -> Iterator[None]:
        """Announce a hop and time it."""
        if not self.settings.quiet:
            print(f"\n== {title}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - started, 1)

    def load(self, kind: type, **fields: Any) -> Any:
        """Settings of a hop: its section of the configuration, and what the demo decides."""
        common = {
            "quiet": self.settings.quiet,
            "tracking_uri": self.settings.tracking_uri or f"sqlite:///{self.root}/mlflow.db",
        }
        loaded = kind.load(self.config)
        return kind.parse({**loaded.model_dump(), **common, **fields}, "the demo")


def run_demo(settings: DemoSettings, config: str | None) -> dict[str, Any]:
    """Walk the whole way.

    Args:
        settings: port, output folder.
        config: configuration file of all hops.

    Returns:
        Losses, scores, the answer, and where everything lies; also written to ``result.json``.
    """
    started = time.perf_counter()
    demo = Demo(settings, config, settings.output_dir("outputs/demo"))
    world, backbones = _draw(demo)
    with start_ray(demo.load(TrainSettings)):
        shards = _prepare(demo, world)
        checkpoint = _train(demo, shards, backbones)
        _score(demo, checkpoint, world)
        artifact = _shrink(demo, checkpoint)
        _ask(demo, artifact, world)
    result = {**demo.facts, "hops": demo.seconds, "seconds": round(time.perf_counter() - started, 1)}
    path = demo.root / "result.json"
    path.write_text(json.dumps(result, indent=1))
    return {**result, "result": str(path)}


def _draw(demo: Demo) -> tuple[Path, Path]:
    """Shipped backbones as a checkpoint folder, and the world's data sets."""
    from pipelines.miniature.jobs import draw_world
    from pipelines.settings import MiniatureSettings
    from tinygptv.miniature.backbones import write_checkpoint

    with demo.hop("draw the world"):
        backbones = write_checkpoint(demo.root / "backbones")
        world = demo.root / "world"
        settings = demo.load(MiniatureSettings, output=str(world))
        mark = world / "drawn.json"
        identity = json.dumps([settings.seed, settings.train_scenes, settings.test_scenes])
        if not mark.is_file() or mark.read_text() != identity:
            draw_world(settings)
            mark.write_text(identity)
    return world, backbones


def _prepare(demo: Demo, world: Path) -> Path:
    """Every source of the recipe as an Arrow shard set."""
    from pipelines.data.ingest.job import ingest

    shards = demo.root / "shards"
    sources = json.loads((world / "sources.json").read_text())
    rows = 0
    with demo.hop("prepare the data (Ray Data -> Arrow shards)"):
        for name, places in sources.items():
            images = "" if places["images"] is None else str(world / places["images"])
            settings = demo.load(
                PrepareDataSettings,
                source=name,
                input=str(world / places["input"]),
                images=images,
                output=str(shards / name),
                tracking_uri="none",
            )
            rows += ingest(settings)["rows_out"]
    demo.facts["rows"] = rows
    return shards


def _train(demo: Demo, shards: Path, backbones: Path) -> Path:
    """Stages 1 to 4, each from the one before; query features of the frozen encoder computed once per image size."""
    from pipelines.data.features import cache_features
    from pipelines.tracking.base import open_tracker
    from pipelines.training.record import RECORD_FILE
    from pipelines.training.run import run_stage

    settings = demo.load(TrainSettings)
    parent_file = demo.root / "training_run.txt"
    parent = open_tracker(settings, "training", run_id=parent_file.read_text() if parent_file.is_file() else "")
    parent_file.write_text(parent.run_id)
    start, losses = backbones, {}
    for stage in RECIPES[settings.recipe]:
        with demo.hop(f"stage {stage.number}: {stage.title}"):
            if settings.features == "cached":
                alike = [other for other in RECIPES[settings.recipe] if other.image_size == stage.image_size]
                names = sorted({source.name for other in alike for source in other.sources})  # one start of an actor
                features = demo.load(
                    CacheFeaturesSettings,
                    data=str(shards),
                    checkpoint=str(start),
                    image_size=stage.image_size,
                    sources=names,
                    output=str(demo.root / "features"),
                )
                cache_features(features)
            output = demo.root / f"stage{stage.number}"
            fields = {"data": str(shards), "init_from": str(start), "output": str(output)}
            result = run_stage(demo.load(TrainSettings, **fields), stage.number, parent_run_id=parent.run_id)
        losses[stage.number] = {
            "first": result["first_loss"],
            "last": result["last_loss"],
            **mean_losses(output / RECORD_FILE),
        }
        start = Path(result["checkpoint"])
    parent.close()
    demo.facts["losses"] = losses
    demo.facts["checkpoint"] = str(start)
    return start


def mean_losses(record: Path) -> dict[str, float]:
    """Mean loss of a stage's first and last tenth: single steps differ by their samples as much as by learning."""
    losses = [json.loads(line)["loss"] for line in record.read_text().splitlines()]
    tenth = max(1, len(losses) // 10)
    return {"first_tenth": sum(losses[:tenth]) / tenth, "last_tenth": sum(losses[-tenth:]) / tenth}


def _score(demo: Demo, checkpoint: Path, world: Path) -> None:
    """Short answers about many scenes, the longer tasks about fewer."""
    from pipelines.evaluation.benchmarks import GROUPS
    from pipelines.evaluation.run import evaluate

    few = demo.load(ScoreSettings).limit
    limits = {
        "vqa": (["miniature_vqa"], 5 * few),
        "tasks": ([n for n in GROUPS["miniature"] if n != "miniature_vqa"], few),
    }
    demo.facts["scores"] = {}
    with demo.hop("score on held-out scenes"):
        for part, (names, limit) in limits.items():
            fields = {"checkpoint": str(checkpoint), "data": str(world), "output": str(demo.root / "score" / part)}
            settings = demo.load(ScoreSettings, benchmark=names, limit=limit, **fields)
            demo.facts["scores"] |= evaluate(settings)["benchmarks"]


def _shrink(demo: Demo, checkpoint: Path) -> Path:
    from pipelines.export import export

    with demo.hop("quantize"):
        artifact = demo.root / "artifact"
        fields = {"checkpoint": str(checkpoint), "output": str(artifact), "data": str(demo.root / "shards")}
        demo.facts["artifact"] = export(demo.load(QuantizeSettings, **fields))
    return artifact


def _ask(demo: Demo, artifact: Path, world: Path) -> None:
    """Serve the artifact and ask over HTTP: a question, and where something is."""
    from pipelines.serving.run import serving

    entry = json.loads((world / "benchmarks/refer.json").read_text())[0]
    asked = [e for e in json.loads((world / "benchmarks/vqa.json").read_text()) if e["image"] == entry["image"]]
    picture = world / "benchmarks/images" / entry["image"]
    with demo.hop("serve and ask over HTTP"):
        settings = demo.load(ServeSettings, artifact=str(artifact), port=demo.settings.port)
        with serving(settings) as address:
            for question in asked[:1]:
                answer = ask(address, picture, f"[vqa] {question['question']}")
                demo.facts["question"] = {
                    "question": question["question"],
                    "answer": answer,
                    "truth": question["answer"],
                }
            located = ask(address, picture, f"[refer] give me the location of {entry['sents']}")
        demo.facts["refer"] = {"phrase": entry["sents"], "answer": located}
    demo.facts["picture"] = str(_draw_answer(picture, entry["sents"], located, demo.root / "answer.png"))


def ask(address: str, picture: Path, text: str) -> str:
    """One question about a picture, through the HTTP endpoint."""
    url = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": "tinygpt-v", "messages": [{"role": "user", "content": content}], "max_tokens": 64}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]


def _draw_answer(picture: Path, phrase: str, answer: str, target: Path) -> Path:
    from PIL import Image

    from tinygptv.data.drawing import draw_boxes

    image = Image.open(picture).convert("RGB")
    scale = max(1, 512 // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    draw_boxes(image, f"<p>{phrase}</p> {answer}").save(target)
    return target


def summary(result: dict[str, Any]) -> str:
    """The closing summary."""
    from pipelines.evaluation.run import score_table

    lines = ["", "Losses, first -> last step of each stage (means of its first and last tenth):"]
    for number, loss in result["losses"].items():
        first, last, *means = (f"{loss[name]:.3f}" for name in ("first", "last", "first_tenth", "last_tenth"))
        lines.append(f"  stage {number}: {first} -> {last}  ({' -> '.join(means)})")
    lines += ["", "Scores on held-out scenes (blind: the same model with the picture blanked):"]
    lines += [f"  {line}" for line in score_table(result["scores"]).splitlines()]
    if "question" in result:
        asked = result["question"]
        lines += ["", f"Asked over HTTP: {asked['question']}", f"Answer: {asked['answer']}   (truth: {asked['truth']})"]
    lines += [f"Asked for the place of {result['refer']['phrase']!r}: {result['refer']['answer']}"]
    root = Path(result["result"]).parent
    lines += [
        f"The picture with the drawn box: {result['picture']}",
        f"Artifact: {result['artifact']['bytes'] / 1e6:.1f} MB, drift {result['artifact']['drift']}",
        "",
        "See the curves:   make mlflow   (opens http://127.0.0.1:5000)",
        "Talk to it:       make serve    (opens http://127.0.0.1:8000)",
        f"Everything lies in {root}; the whole way took {result['seconds']:.0f} s.",
        result["result"],
    ]
    return "\n".join(lines)
