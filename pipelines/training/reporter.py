"""Rank 0's pen: the per-step record, the tracker, the progress line and sample predictions.

Losses stay on the device until the loop reads them, so that a GPU is not made to wait in between.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from pipelines.data.loader import BatchMaker, StepBatch
from pipelines.progress import PROGRESS_FILE, StepProgress
from pipelines.tracking.base import NullTracker, Tracker, open_tracker
from pipelines.training.job import TrainJob
from pipelines.training.record import RECORD_FILE, StepRecord
from pipelines.training.sample_predictions import SamplePredictor
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.train_step import StepResult

logger = logging.getLogger(__name__)


class Reporter:
    """Writes down what happens; one per training, on rank 0."""

    def __init__(self, job: TrainJob, next_step: int, world_size: int) -> None:
        self.job, self.world_size = job, world_size
        self.path = Path(job.output) / RECORD_FILE
        self.record = StepRecord(self.path, next_step)
        self.tracker: Tracker = (
            open_tracker(
                job.settings,
                job.stage.title,
                run_id=job.run["run_id"],
                key=job.run["key"],
                parent_run_id=job.run["parent"],
                journal=Path(job.output),
            )
            if job.run
            else NullTracker()
        )
        self.progress = StepProgress(f"stage {job.stage.number} ({job.stage.title})", next_step, job.num_steps)
        self.progress_file = Path(job.output) / PROGRESS_FILE
        self.pending: list[tuple[StepBatch, StepResult, float]] = []
        self.clock = time.perf_counter()
        self._predictor: SamplePredictor | None = None
        self._losses: list[float] = []
        psutil.cpu_percent()  # the first call only starts the clock

    def step(self, batch: StepBatch, result: StepResult, learning_rate: float) -> None:
        """Take a finished step; nothing is read from the device."""
        self.pending.append((batch, result, learning_rate))

    def read(self, part_norms: dict[str, float]) -> None:
        """Read the losses of the steps since the last call, and write everything down.

        Args:
            part_norms: gradient norms of the newest step.
        """
        if not self.pending:
            return
        losses = [float(result.loss) for _, result, _ in self.pending]  # waits for the device, once
        rates = self._rates()
        last = self.pending[-1][0].step
        for (batch, result, learning_rate), loss in zip(self.pending, losses, strict=True):
            newest = batch.step == last
            self._write(batch, result, learning_rate, loss, part_norms if newest else {}, rates if newest else {})
        self._losses += losses
        line = self.progress.line(
            last + 1, losses[-1], self.pending[-1][2], rates["samples_per_second"], rates["data_wait_share"]
        )
        self.progress_file.write_text(line)  # the driver shows it: workers' own output is not for people
        self.pending.clear()

    def _rates(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self.clock, 1e-9)
        self.clock = now
        batches = [batch for batch, _, _ in self.pending]
        tokens = sum(micro.num_real for batch in batches for micro in batch.micro_batches)
        rates = {
            "tokens_per_second": tokens * self.world_size / seconds,  # the others' shares are about as large
            "samples_per_second": sum(len(batch.sample_ids) for batch in batches) / seconds,
            "data_wait_share": min(1.0, sum(batch.wait_s for batch in batches) / seconds),
            "reduce_share": min(1.0, sum(result.reduce_s for _, result, _ in self.pending) / seconds),
            "system/memory_gb": psutil.Process().memory_info().rss / 1e9,
            "system/cpu_percent": psutil.cpu_percent(),
        }
        if torch.cuda.is_initialized():
            rates["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return rates

    def _write(
        self,
        batch: StepBatch,
        result: StepResult,
        learning_rate: float,
        loss: float,
        part_norms: dict[str, float],
        rates: dict[str, float],
    ) -> None:
        """Record a step; ``part_norms`` and ``rates`` are known at the newest of the steps that are read together."""
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
        values = {"loss": loss, "lr": learning_rate, "grad_norm": grad_norm, **per_source, **rates}
        values |= {f"grad_norm/{part}": norm for part, norm in part_norms.items()}
        if skipped:
            values["skipped"] = 1.0
        self.tracker.metrics(values, batch.step)

    def stepped_over(self, batch: StepBatch, learning_rate: float) -> None:
        """Take a step whose data the guard leaves out."""
        none, nan = torch.zeros(len(self.job.stage.sources)), torch.tensor(math.nan, dtype=torch.float64)
        self.step(batch, StepResult(nan, none, none, nan, torch.ones(()), 0.0), learning_rate)

    def predictions(self, model: TinyGPTVForConditionalGeneration, step: int) -> None:
        """Write down what the model answers to the same few samples; a step that is done again is not asked again."""
        path = Path(self.job.output) / f"predictions/step_{step + 1:06d}.json"
        if isinstance(self.tracker, NullTracker) or path.is_file():
            return
        if self._predictor is None:
            self._predictor = SamplePredictor(BatchMaker(self.job.plan))
        try:
            rows = self._predictor.predict(model)
        except Exception:  # a look at the answers must not stop training
            logger.exception("no sample predictions at step %d", step + 1)
            return
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([{**row, "image": None} for row in rows], indent=1))
        self.tracker.table(rows, f"predictions/{path.stem}")
        for number, row in enumerate(rows):
            if row["image"] is not None:
                self.tracker.image(row["image"], f"predictions/{number}", step)
        self.clock = time.perf_counter()  # this was no training

    def flush(self) -> float:
        """Hand the record to the system, so that it agrees with a state of now; returns the mean loss since then."""
        self.record.flush()
        losses = [loss for loss in self._losses if math.isfinite(loss)]
        self._losses.clear()
        return sum(losses) / len(losses) if losses else math.inf

    def rewind(self, next_step: int) -> None:
        """Forget the steps from ``next_step`` on: they will be done again."""
        self.record.close()
        self.pending.clear()
        self._losses.clear()
        self.record = StepRecord(self.path, next_step)

    def abandon(self) -> None:
        """Close all before the end."""
        self.record.close()
        self.tracker.close("FAILED")

    def finish(self, checkpoint: str) -> dict[str, Any]:
        """Close all; returns the stage's result."""
        self.record.close()
        self.tracker.close()
        return {
            "checkpoint": checkpoint,
            "first_loss": self.record.first_loss,
            "last_loss": self.record.last_loss,
            "steps": self.job.num_steps,
        }
