"""The miniature's jobs: draw the world's data sets, pretrain the backbones."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pipelines.progress import Bar
from pipelines.settings import MiniatureSettings, SettingsError
from pipelines.tracking import open_tracker

VISION_STEPS, LANGUAGE_STEPS = 3_500, 4_000
VISION_SCENES, HELD_OUT_SCENES = 24_000, 1_024
SIDES = (64, 128)


def run_miniature(settings: MiniatureSettings) -> dict[str, Any]:
    """Draw or pretrain, as ``settings.task`` says; returns the result."""
    tasks = {"draw": draw_world, "pretrain": pretrain_backbones}
    if settings.task not in tasks:
        raise SettingsError(f"task={settings.task!r}: choose one of {sorted(tasks)}.")
    result = tasks[settings.task](settings)
    path = settings.output_dir(result["folder"]) / "result.json"
    path.write_text(json.dumps(result, indent=1))
    return {**result, "result": str(path)}


def draw_world(settings: MiniatureSettings) -> dict[str, Any]:
    """Write the drawn world's data sets and benchmarks in the formats of the real ones."""
    from tinygptv.miniature.writers import write_world

    output = settings.output_dir("data/miniature")
    started = time.perf_counter()
    with Bar("drawing scenes", quiet=settings.quiet) as bar:
        write_world(
            output,
            settings.train_scenes,
            settings.test_scenes,
            settings.seed,
            workers=os.cpu_count() or 1,
            progress=bar.update,
        )
    return {"folder": str(output), "seconds": round(time.perf_counter() - started, 1)}


def pretrain_backbones(settings: MiniatureSettings) -> dict[str, Any]:
    """Pretrain vision encoder with Q-Former, and language model; resumable; writes a checkpoint folder."""
    import torch

    from tinygptv.config import TinyGPTVConfig
    from tinygptv.miniature.backbones import assemble_backbones
    from tinygptv.miniature.pretrain_language import LanguageTask, train_tokenizer
    from tinygptv.miniature.pretrain_vision import ScenePool, VisionTask
    from tinygptv.miniature.pretraining import pretrain
    from tinygptv.processing import load_tokenizer

    output = settings.output_dir("outputs/miniature")
    started = time.perf_counter()
    config = TinyGPTVConfig.mini(lora_rank=0)
    tracker = open_tracker(settings, "pretrain the miniature")
    tracker.params(settings.model_dump())

    def reporter(part: str) -> Any:
        def report(step: int, numbers: dict[str, float]) -> None:
            tracker.metrics({f"{part}/{name}": value for name, value in numbers.items()}, step)
            if not settings.quiet:
                text = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())
                print(f"{part} step {step}: {text}", flush=True)

        return report

    scores: dict[str, float] = {}
    modules = {}
    if settings.parts != "language":
        torch.manual_seed(settings.seed)
        scenes = min(VISION_SCENES, 64 * (settings.max_steps or VISION_SCENES))
        held_out = min(HELD_OUT_SCENES, scenes)
        task = VisionTask(
            config,
            ScenePool.draw(settings.seed, "train", scenes, SIDES),
            ScenePool.draw(settings.seed, "validation", held_out, SIDES),
            seed=settings.seed,
        )
        scores |= pretrain(
            task,
            num_steps=settings.max_steps or VISION_STEPS,
            peak_learning_rate=1e-3,
            state_dir=output / "vision",
            report=reporter("vision"),
            evaluate_every=1000,
        )
        modules["vision"] = task.module
    if settings.parts != "vision":
        torch.manual_seed(settings.seed + 1)
        tokenizer = _tokenizer(
            output / "tokenizer", settings.seed, config.text_config.vocab_size - 1, train_tokenizer, load_tokenizer
        )
        language = LanguageTask(config, tokenizer, world_seed=settings.seed, seed=settings.seed)
        scores |= pretrain(
            language,
            num_steps=settings.max_steps or LANGUAGE_STEPS,
            peak_learning_rate=1.5e-3,
            state_dir=output / "language",
            report=reporter("language"),
            evaluate_every=1000,
        )
        modules["language"] = language.module
    result: dict[str, Any] = {
        "folder": str(output),
        "scores": scores,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if len(modules) == 2:
        facts = {"title": "pretrained backbones of the miniature", "seed": settings.seed, **result}
        folder = assemble_backbones(
            output / "backbones", config, modules["vision"], modules["language"], tokenizer, facts
        )
        result["checkpoint"] = str(folder)
    tracker.close()
    return result


def _tokenizer(folder: Path, seed: int, vocab_size: int, train: Any, load: Any) -> Any:
    if not (folder / "tokenizer.json").is_file():
        train(seed, vocab_size).save_pretrained(folder)
    return load(folder)
