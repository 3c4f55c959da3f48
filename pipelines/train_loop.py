"""The loop of one training worker. It reads like the paper's recipe: batch, loss, update, record, save.

Every worker runs it; rank 0 writes. Nothing here knows which stage it is in: the stage is data.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.loader import LoadPlan, StepBatch, iterate_steps
from pipelines.progress import PROGRESS_FILE, StepProgress
from pipelines.settings import TrainSettings
from pipelines.tracking import NullTracker, Tracker, open_tracker
from pipelines.train_state import StateStore, StepRecord, collect_state, restore_state
from tinygptv.checkpoint import load_checkpoint, save_checkpoint
from tinygptv.optim import build_optimizer
from tinygptv.processing import TinyGPTVImageProcessor, TinyGPTVProcessor
from tinygptv.stages import Stage, set_trainable
from tinygptv.train_step import PRECISIONS, StepResult, TrainStep


@dataclass(frozen=True)
class TrainJob:
    """One stage, resolved: what the driver hands to every worker.

    Attributes:
        settings: where and how large.
        stage: the stage with its changes applied.
        plan: how batches are made.
        num_steps: optimizer steps to reach.
        output: result folder, absolute.
        run_id: MLflow run to log into; empty for none.
    """

    settings: TrainSettings
    stage: Stage
    plan: LoadPlan
    num_steps: int
    output: str
    run_id: str


def train_loop(job: TrainJob) -> dict[str, Any]:
    """Train from wherever the run stands to the end of the stage.

    Returns:
        ``first_loss``, ``last_loss``, ``steps``, ``checkpoint`` (rank 0; others return an empty dict).
    """
    rank, world_size = _rank(), _world_size()
    output = Path(job.output)
    torch.set_num_threads(job.settings.threads_per_worker or max(1, (os.cpu_count() or 1) // max(world_size, 1)))
    torch.manual_seed(job.settings.seed)  # fresh LoRA adapters must be the same on every worker

    model, processor = build_model(job)
    optimizer = build_optimizer(model, job.stage.schedule, job.stage.weight_decay, job.stage.beta2)
    step = TrainStep(
        model,
        optimizer,
        num_sources=len(job.stage.sources),
        precision=job.settings.precision,
        max_grad_norm=job.stage.max_grad_norm,
    )
    store = StateStore(output / "states", job.settings.keep_checkpoints)
    next_step = _resume(store, step)

    reporter = Reporter(job, next_step) if rank == 0 else None
    plan = job.plan.for_worker(rank, world_size)
    batches = iterate_steps(
        plan,
        next_step,
        job.num_steps,
        loader_workers=job.settings.loader_workers,
        prefetch_steps=job.settings.prefetch_steps,
    )
    for batch in batches:
        torch.manual_seed(_dropout_seed(job.settings.seed, batch.step, rank))
        learning_rate = job.stage.schedule.learning_rate(batch.step)
        result = step.run(batch.micro_batches, learning_rate)
        if reporter:
            reporter.step(batch, result, learning_rate, step)
        if (batch.step + 1) % job.settings.checkpoint_every == 0 and batch.step + 1 < job.num_steps and rank == 0:
            assert reporter is not None
            reporter.flush()
            store.save(batch.step + 1, *collect_state(step))
    if rank != 0:
        return {}
    assert reporter is not None
    store.wait()
    checkpoint = save_checkpoint(output / "checkpoint", model, processor, _stage_facts(job))
    return reporter.finish(str(checkpoint))


def build_model(job: TrainJob) -> tuple[Any, TinyGPTVProcessor]:
    """Load the start, bring it to the stage's size, add what trains, freeze the rest."""
    settings, stage = job.settings, job.stage
    device = torch.device("cuda", torch.cuda.current_device()) if settings.use_gpu else torch.device("cpu")
    model, processor, _ = load_checkpoint(
        settings.init_from, dtype=PRECISIONS[settings.precision], attn_implementation=settings.attention
    )
    model.set_image_size(stage.image_size)
    if stage.lora_rank and not model.config.lora_rank:
        model.add_lora(stage.lora_rank, stage.lora_alpha, stage.lora_dropout)
    set_trainable(model, stage.trainable)
    torch.nn.Module.to(model, device).train()
    if settings.gradient_checkpointing:
        # transformers 5.20 renamed it and warns about the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if settings.compile:
        model.language_model.compile(dynamic=True)
    processor = TinyGPTVProcessor(
        TinyGPTVImageProcessor(stage.image_size),
        processor.tokenizer,
        num_query_tokens=model.config.num_query_tokens,
        image_token_id=model.config.image_token_id,
        template=stage.template,
    )
    return model, processor


class Reporter:
    """Rank 0's pen: the per-step record, the tracker and the progress line.

    Losses stay on the device until ``log_every`` steps are gathered, so that a GPU is not made to wait in between.
    """

    def __init__(self, job: TrainJob, next_step: int) -> None:
        self.job = job
        self.record = StepRecord(Path(job.output) / "metrics.jsonl", next_step)
        self.tracker: Tracker = (
            open_tracker(job.settings, job.stage.title, run_id=job.run_id) if job.run_id else NullTracker()
        )
        self.progress = StepProgress(f"stage {job.stage.number} ({job.stage.title})", next_step, job.num_steps)
        self.progress_file = Path(job.output) / PROGRESS_FILE
        self.pending: list[tuple[StepBatch, StepResult, float]] = []
        self.clock = time.perf_counter()
        self.waits: deque[float] = deque(maxlen=100)

    def step(self, batch: StepBatch, result: StepResult, learning_rate: float, train_step: TrainStep) -> None:
        """Take a finished step."""
        self.pending.append((batch, result, learning_rate))
        if len(self.pending) >= self.job.settings.log_every or batch.step + 1 == self.job.num_steps:
            self._drain(train_step)

    def _drain(self, train_step: TrainStep | None = None) -> None:
        if not self.pending:
            return
        losses = [float(result.loss) for _, result, _ in self.pending]  # waits for the device, once
        now = time.perf_counter()
        seconds = max(now - self.clock, 1e-9)
        self.clock = now
        tokens = sum(m.num_real for batch, _, _ in self.pending for m in batch.micro_batches)
        samples = sum(len(batch.sample_ids) for batch, _, _ in self.pending)
        wait = sum(batch.wait_s for batch, _, _ in self.pending)
        rates = {
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            "data_wait_share": min(1.0, wait / seconds),
        }
        part_norms = train_step.part_norms() if train_step else {}
        last = self.pending[-1][0].step
        for (batch, result, learning_rate), loss in zip(self.pending, losses, strict=True):
            self._write(batch, result, learning_rate, loss, part_norms if batch.step == last else {})
        self.tracker.metrics({**rates, **{f"grad_norm/{part}": norm for part, norm in part_norms.items()}}, last)
        line = self.progress.line(
            last + 1, losses[-1], self.pending[-1][2], rates["samples_per_second"], rates["data_wait_share"]
        )
        self.progress_file.write_text(line)  # the driver shows it: workers' own output is not for people
        self.pending.clear()

    def _write(
        self, batch: StepBatch, result: StepResult, learning_rate: float, loss: float, part_norms: dict[str, float]
    ) -> None:
        """Record a step; ``part_norms`` are known at the last of ``log_every`` steps only."""
        names = [source.name for source in self.job.stage.sources]
        sums, counts = result.source_loss_sums.tolist(), result.source_tokens.tolist()
        per_source = {f"loss/{n}": s / c for n, s, c in zip(names, sums, counts, strict=True) if c}
        grad_norm, skipped = float(result.grad_norm), bool(result.skipped)
        self.record.write(
            {
                "step": batch.step,
                "loss": loss,
                "loss_hex": loss.hex(),
                "lr": learning_rate,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
                "skipped": skipped,
                **({"part_norms": part_norms} if part_norms else {}),
                "sample_ids": batch.sample_ids,
            }
        )
        values = {"loss": loss, "lr": learning_rate, "grad_norm": grad_norm, **per_source}
        if skipped:
            values["skipped"] = 1.0
        self.tracker.metrics(values, batch.step)

    def flush(self) -> None:
        """Write everything that is known; called before a training state is saved, so that the two agree."""
        self._drain()
        self.record.flush()

    def finish(self, checkpoint: str) -> dict[str, Any]:
        """Close all; returns the stage's result."""
        self.flush()
        self.record.close()
        self.tracker.close()
        return {
            "checkpoint": checkpoint,
            "first_loss": self.record.first_loss,
            "last_loss": self.record.last_loss,
            "steps": self.job.num_steps,
        }


def _resume(store: StateStore, step: TrainStep) -> int:
    """Restore the newest state on every worker; returns the next step."""
    found = store.newest()
    if found is None:
        return 0
    next_step, tensors, extra = found
    restore_state(step, tensors, extra)
    return next_step


def _stage_facts(job: TrainJob) -> dict[str, Any]:
    return {
        "recipe": job.settings.recipe,
        "stage": job.stage.number,
        "title": job.stage.title,
        "steps": job.num_steps,
        "seed": job.settings.seed,
        "init_from": job.settings.init_from,
    }


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout depends on the step alone, so a resumed run draws what the straight one would."""
    return (seed * 1_000_003 + step) * 1009 + rank


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
