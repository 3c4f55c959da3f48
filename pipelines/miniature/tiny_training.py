"""Small shard sets, a start checkpoint and settings of a training that takes seconds, for tests and benchmarks."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import storage
from pipelines.data.shard_format import MANIFEST, Manifest, ShardWriter, record_batch
from pipelines.settings import TrainSettings
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.data.sample import SampleRow, Turn
from tinygptv.miniature.draw import encode_jpeg
from tinygptv.miniature.scenes import make_scene
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

STAGE: dict[str, Any] = {
    "sources": {"pairs": {"weight": 2, "batch_size": 4}, "questions": {"weight": 1, "batch_size": 3}},
    "draws_per_step": 2,
    "image_size": 28,
    "lora_rank": 2,
    "lora_dropout": 0.0,
    "schedule": {"steps_per_epoch": 6, "epochs": 2, "peak": 1e-2, "minimum": 1e-3, "warmup_start": 1e-3},
    "max_grad_norm": 1.0,
}
"""Changes that bring a stage of the mini recipe down to a test's size."""


def write_shard_set(folder: Path, rows: list[SampleRow], rows_per_shard: int = 8) -> Path:
    """A shard set as ``jobs/prepare_data.py`` leaves it."""
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, len(rows), rows_per_shard)):
        writer = ShardWriter(str(folder / f"part-{number:05d}.arrow"))
        writer.write(record_batch(rows[start : start + rows_per_shard]))
        shards.append(writer.close())
    storage.write_atomically(str(folder / MANIFEST), Manifest(folder.name, tuple(shards)).to_json())
    return folder


def make_rows(source: str, count: int) -> list[SampleRow]:
    """Captions (``pairs``), or questions of which every fourth has no image (``questions``)."""
    rng = np.random.default_rng(len(source))
    rows = []
    for i in range(count):
        image = _drawn(i)
        words = " ".join(rng.choice(["red", "blue", "dog", "cat", "big"], size=int(rng.integers(1, 6))))
        if source == "pairs":
            rows.append(SampleRow(f"p{i}", source, "pair", (Turn("", (words,)),), *image))
        elif i % 4 == 3:
            rows.append(SampleRow(f"q{i}", source, "text", (Turn(f"say {words}", (words,)),)))
        else:
            rows.append(SampleRow(f"q{i}", source, "vqa", (Turn("what?", (words, "yes")),), *image))
    return rows


@cache
def _drawn(number: int) -> tuple[bytes, int, int]:
    scene = make_scene(3, "train", number)
    return encode_jpeg(scene), scene.width, scene.height


def make_world(folder: Path, rows: int = 30) -> dict[str, str]:
    """Shard sets and a start checkpoint; returns ``data`` and ``init_from``.

    Args:
        folder: where they are written.
        rows: of the source ``pairs``; ``questions`` has 22.
    """
    for source, count in (("pairs", rows), ("questions", 22)):
        write_shard_set(folder / "shards" / source, make_rows(source, count))
    torch.manual_seed(0)
    config = tiny_config(lora_rank=0)
    model = TinyGPTVForConditionalGeneration(config)
    start = folder / "start"
    save_checkpoint(start, model, TinyGPTVProcessor.from_config(config, tiny_tokenizer()), {"title": "test start"})
    return {"data": str(folder / "shards"), "init_from": str(start)}


def train_settings(world: dict[str, str], output: Path, **changes: Any) -> TrainSettings:
    """Settings of a run that takes a second or two."""
    stage = {**STAGE, **changes.pop("stage", {})}
    fields = {
        "tracking_uri": "none",
        "quiet": True,
        "num_workers": 0,
        "loader_workers": 0,
        "checkpoint_every": 3,
        "micro_batch_size": 8,
        "threads_per_worker": 1,
        "log_every": 2,
        **world,
        **changes,
    }
    return TrainSettings(output=str(output), stage=stage, **fields)


def command_changes(epochs: int = 1) -> dict[str, Any]:
    """Changes of a stage that any number of jobs can train: one source, so many epochs of 6 steps."""
    stage = {"sources": {"pairs": {"weight": 1, "batch_size": 4}}, "draws_per_step": 1}
    return {"stage": {**stage, "schedule": {**STAGE["schedule"], "epochs": epochs}}}


def command_line(world: dict[str, str], output: Path, epochs: int = 1, **changes: Any) -> list[str]:
    """The same settings as words for a job's command line."""
    return as_words(train_settings(world, output, quiet=False, **command_changes(epochs), **changes))


def as_words(settings: TrainSettings) -> list[str]:
    """Settings as ``key=value`` words of a command line."""
    fields = settings.model_dump(exclude_defaults=True)
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in fields.items()]
