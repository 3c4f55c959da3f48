"""Jobs of the miniature: draw the world's data sets, pretrain the backbones, copy trained weights to package data."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.fingerprint import Fingerprint, claim
from pipelines.json_files import write_json
from pipelines.miniature.example import draw_example
from pipelines.miniature.world import MiniatureResult, draw_world
from pipelines.settings import MiniatureSettings, SettingsError
from pipelines.tracking.base import Tracker, continue_tracker
from tinygptv.checkpoint.stage_record import StageRecord

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from tinygptv.config import TinyGPTVConfig
    from tinygptv.miniature.pretraining import PretrainingTask

VISION_CYCLES, LANGUAGE_CYCLES = (3_000,), (2_600, 2_400)
VISION_RATE, LANGUAGE_RATE = 1e-3, 2e-3
VISION_SCENES, HELD_OUT_SCENES = 24_000, 1_024
SIDES = (64, 128)

_PRETRAIN_RESULTS = ("vision", "language", "tokenizer", "backbones", "result.json", "run.json", "unsent.jsonl")


def run_miniature(settings: MiniatureSettings) -> MiniatureResult:
    """Do ``settings.task``; returns the result.

    Raises:
        SettingsError: there is no such task, or it lacks its input.
    """
    tasks: dict[str, Callable[[MiniatureSettings], MiniatureResult]] = {
        "draw": draw_world,
        "example": draw_example,
        "pretrain": pretrain_backbones,
        "ship": ship,
    }
    if settings.task not in tasks:
        raise SettingsError(f"task={settings.task!r}: choose one of {sorted(tasks)}.")
    result = tasks[settings.task](settings)
    path = Path(result["folder"]) / "result.json"
    write_json(path, result)
    result["result"] = str(path)
    return result


def pretrain_backbones(settings: MiniatureSettings) -> MiniatureResult:
    """Pretrain the vision encoder with the Q-Former, and the language model; resumable; writes a checkpoint folder.

    ``settings.parts`` names one of the two alone; the checkpoint is written by the run that finds both.
    """
    from tinygptv.config import TinyGPTVConfig
    from tinygptv.miniature.backbones import assemble_backbones

    output = settings.output_dir("outputs/miniature")
    started = time.perf_counter()
    fingerprint = Fingerprint.of("pretrain", seed=settings.seed, max_steps=settings.max_steps)
    claim(output, fingerprint, _PRETRAIN_RESULTS, overwrite=settings.overwrite)
    config = TinyGPTVConfig.mini(lora_rank=0)
    tracker = continue_tracker(settings, "pretrain the miniature", output)
    tracker.params(settings.model_dump())
    tokenizer = _tokenizer(output / "tokenizer", settings.seed, config.text_config.vocab_size - 1)
    makers = {
        "vision": (lambda: _vision_task(settings, config), VISION_CYCLES, VISION_RATE, ""),
        "language": (lambda: _language_task(settings, config, tokenizer), LANGUAGE_CYCLES, LANGUAGE_RATE, "layers."),
    }
    scores: dict[str, float] = {}
    modules: dict[str, nn.Module] = {}
    for part, (make_task, cycles, rate, orthogonalized) in makers.items():
        if settings.parts in ("all", part):
            task = make_task()
            wanted = (settings.max_steps,) if settings.max_steps else cycles
            scores |= _pretrain(task, part, wanted, rate, orthogonalized, settings, tracker)
            modules[part] = task.module
    result: MiniatureResult = {
        "folder": str(output),
        "scores": scores,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if len(modules) == len(makers):
        metadata: StageRecord = {
            "title": "pretrained backbones of the miniature",
            "seed": settings.seed,
            "scores": scores,
        }
        folder = assemble_backbones(
            output / "backbones", config, modules["vision"], modules["language"], tokenizer, metadata
        )
        result["checkpoint"] = str(folder)
    tracker.close()
    return result


def ship(settings: MiniatureSettings) -> MiniatureResult:
    """Copy backbones and trained stages to package data, so that an installation has them.

    ``settings.backbones`` is the checkpoint that ``pretrain_backbones`` wrote, ``settings.stages`` the folder that
    holds ``stage1/checkpoint`` to ``stage4/checkpoint``, e.g. the demo's output; either may be empty.
    """
    from tinygptv.miniature.backbones import DATA, ship_backbones, ship_stage

    if not (settings.backbones or settings.stages):
        raise SettingsError(
            "give backbones=DIR (a pretrained checkpoint), stages=DIR (with stage1 .. stage4), or both."
        )
    if settings.backbones:
        ship_backbones(Path(settings.backbones))
    if settings.stages:
        for number in (1, 2, 3, 4):
            ship_stage(Path(settings.stages) / f"stage{number}" / "checkpoint", number)
    num_bytes = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    return {"folder": str(settings.output_dir("outputs/miniature")), "package_data": str(DATA), "bytes": num_bytes}


def _vision_task(settings: MiniatureSettings, config: TinyGPTVConfig) -> PretrainingTask:
    import torch

    from tinygptv.miniature.pretrain_vision import ScenePool, VisionTask

    torch.manual_seed(settings.seed)
    num_scenes = min(VISION_SCENES, 64 * (settings.max_steps or VISION_SCENES))
    return VisionTask(
        config,
        ScenePool.draw(settings.seed, "train", num_scenes, SIDES),
        ScenePool.draw(settings.seed, "validation", min(HELD_OUT_SCENES, num_scenes), SIDES),
        seed=settings.seed,
    )


def _language_task(
    settings: MiniatureSettings, config: TinyGPTVConfig, tokenizer: PreTrainedTokenizerBase
) -> PretrainingTask:
    import torch

    from tinygptv.miniature.pretrain_language import LanguageTask

    torch.manual_seed(settings.seed + 1)
    lookups_from = LANGUAGE_CYCLES[0]
    return LanguageTask(config, tokenizer, world_seed=settings.seed, seed=settings.seed, lookups_from=lookups_from)


def _pretrain(
    task: PretrainingTask,
    part: str,
    cycles: tuple[int, ...],
    peak_learning_rate: float,
    orthogonalized: str,
    settings: MiniatureSettings,
    tracker: Tracker,
) -> dict[str, float]:
    from tinygptv.miniature.pretraining import pretrain

    def report(step: int, numbers: dict[str, float]) -> None:
        tracker.metrics({f"{part}/{name}": value for name, value in numbers.items()}, step)
        if not settings.quiet:
            text = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            print(f"{part} step {step}/{sum(cycles)}: {text}", flush=True)

    return pretrain(
        task,
        cycles=cycles,
        peak_learning_rate=peak_learning_rate,
        orthogonalized=orthogonalized,
        state_dir=settings.output_dir("outputs/miniature") / part,
        report=report,
        evaluate_every=1000,
    )


def _tokenizer(folder: Path, seed: int, vocab_size: int) -> PreTrainedTokenizerBase:
    from tinygptv.data.processing import load_tokenizer
    from tinygptv.miniature.pretrain_language import train_tokenizer

    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(seed, vocab_size).save_pretrained(folder)
    return load_tokenizer(folder)
