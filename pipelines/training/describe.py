"""Plan of a stage before it runs: the resolved stage, what trains, the memory it takes, the data it reads.

Nothing is loaded and no GPU is touched: parameters are counted on the meta device.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from pipelines.data.loader import open_shards
from pipelines.node_cache import local_checkpoint
from pipelines.settings import TrainSettings
from pipelines.training.fit import computation_of
from tinygptv.checkpoint.config_file import read_config
from tinygptv.config import TinyGPTVConfig
from tinygptv.model.meta import build_on_meta
from tinygptv.training.memory_plan import GIB, PARTS, TrainingMemory
from tinygptv.training.stages import Stage, set_trainable


def describe_stage(settings: TrainSettings, stage: Stage) -> str:
    """Everything worth knowing before a stage starts, as text.

    Args:
        settings: where and how large; ``init_from`` and ``data`` may be empty, and are told so.
        stage: with its changes applied.
    """
    config = model_config(settings, stage)
    blocks = [
        _stage_lines(settings, stage),
        _parameter_lines(config, stage),
        _memory_lines(settings, config, stage),
        _data_lines(settings, stage),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def model_config(settings: TrainSettings, stage: Stage) -> TinyGPTVConfig:
    """Configuration of the model that the stage trains: of its start, or of the recipe's own size."""
    if not settings.init_from:
        from pipelines.training.memory_plan import recipe_config

        return recipe_config(settings.recipe, stage)
    config = read_config(local_checkpoint(settings.init_from, weights=False))
    config.vision_config.image_size = stage.image_size
    config.lora_rank = config.lora_rank or stage.lora_rank
    return config


def _stage_lines(settings: TrainSettings, stage: Stage) -> list[str]:
    schedule = stage.schedule
    steps = min(settings.max_steps or schedule.num_steps, schedule.num_steps)
    rates = ", ".join(f"{name} {value:g}" for name, value in asdict(schedule).items() if isinstance(value, float))
    samples = sorted({stage.draws_per_step * source.batch_size for source in stage.sources})
    each = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    lora = f"rank {stage.lora_rank}, alpha {stage.lora_alpha}, dropout {stage.lora_dropout}"
    rows = {
        "stage": f"{stage.number} ({stage.title}), recipe {settings.recipe}, seed {settings.seed}",
        "trains": ", ".join(stage.trainable),
        "start": settings.init_from or "not given (init_from=DIR)",
        "image side": f"{stage.image_size} px",
        "template": f"{stage.template}, at most {stage.limits.max_text_tokens} tokens of text",
        "steps": f"{steps:,} of {schedule.epochs} x {schedule.steps_per_epoch:,}",
        "samples per step": f"{each}, over {max(settings.num_workers, 1)} worker(s) by {settings.micro_batch_size}",
        "learning rate": f"{schedule.kind}: {rates}, warm-up {schedule.warmup_steps} steps",
        "optimizer": f"AdamW, weight decay {stage.weight_decay}, beta2 {stage.beta2}, clip {stage.max_grad_norm}",
        "LoRA": lora if stage.lora_rank else "none",
        "precision": f"{settings.precision}, encoder {settings.encoder_precision or settings.precision}, "
        f"frozen weights {settings.frozen_weights}, "
        f"attention {settings.attention}, features {settings.features}, "
        f"packing {settings.packing}, gradient checkpointing {settings.gradient_checkpointing}, "
        f"compile {settings.compile}",
        "checkpoints": f"every {settings.checkpoint_every} steps in {settings.storage_path or settings.output}",
        "guard": settings.guard,
    }
    width = max(len(name) for name in rows)
    return [f"{name:{width}}  {value}" for name, value in rows.items()]


def _parameter_lines(config: TinyGPTVConfig, stage: Stage) -> list[str]:
    model = build_on_meta(config)
    set_trainable(model, stage.trainable)
    lines = [f"{'part':16}{'parameters':>16}{'trainable':>14}"]
    named = list(model.named_parameters())
    for part in PARTS:
        of_part = [p for name, p in named if name.startswith(f"{part}.")]
        lines.append(_counts(part, of_part))
    return [*lines, _counts("total", [p for _, p in named])]


def _counts(name: str, parameters: list[torch.nn.Parameter]) -> str:
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return f"{name:16}{sum(p.numel() for p in parameters):16,}{trainable:14,}"


def _memory_lines(settings: TrainSettings, config: TinyGPTVConfig, stage: Stage) -> list[str]:
    memory = TrainingMemory(config, stage, computation_of(settings))
    size = stage.max_step_samples
    if settings.micro_batch_size != "auto":
        size = min(settings.micro_batch_size, size)
    plan = memory.plan(size)
    rows = {
        "weights": sum(plan.weights.values()),
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "activations": plan.activations,
        "workspace": plan.workspace,
        "allocator": plan.margin,
        "peak": plan.peak,
    }
    where = "a GPU" if settings.use_gpu else "a CPU"
    title = (
        f"memory of a worker on {where}, {size} samples of {memory.num_tokens} tokens at a time: {memory.computation}"
    )
    return [title, *(f"{name:16}{value / GIB:11.2f} GiB" for name, value in rows.items())]


def _data_lines(settings: TrainSettings, stage: Stage) -> list[str]:
    total = sum(source.weight for source in stage.sources)
    lines = [f"{'source':26}{'share':>8}{'at a time':>11}{'rows':>14}"]
    try:
        rows = {name: f"{sum(s.shard_rows):,}" for name, s in open_shards(settings.data, stage).items()}
        note = []
    except FileNotFoundError as error:
        rows = {}
        note = [str(error) if settings.data else "data is not given (data=DIR)"]
    lines += [f"{s.name:26}{s.weight / total:8.1%}{s.batch_size:11}{rows.get(s.name, '?'):>14}" for s in stage.sources]
    return lines + note
