"""Step reporting on rank 0: metrics.jsonl, tracker, progress line, sample predictions.

Losses stay on the device until the loop reads them, so that a GPU does not wait in between.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil
import torch

from pipelines import storage
from pipelines.data.loader import BatchMaker, CutCount, StepBatch
from pipelines.json_files import write_json
from pipelines.progress import PROGRESS_FILE, StepProgress
from pipelines.tracking.base import NullTracker, Tracker, open_tracker
from pipelines.tracking.described import hardware_tags
from pipelines.training.held_out_record import Evaluation, HeldOutHistory, HeldOutResult
from pipelines.training.job import TrainJob
from pipelines.training.record import HELD_OUT_FILE, PREDICTIONS_FOLDER, RECORD_FILE, StepEntry, StepRecord
from pipelines.training.result import WorkerResult, cut_sentence
from pipelines.training.sample_predictions import SamplePredictor
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.training.train_step import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """A finished step whose numbers are still on the device."""

    batch: StepBatch
    result: StepResult
    learning_rate: float


class Reporter:
    """Reports the steps of one training; on rank 0."""

    def __init__(self, job: TrainJob, work: storage.WorkFolder, next_step: int, world_size: int) -> None:
        self.job, self.work, self.world_size = job, work, world_size
        self.path = work.path / RECORD_FILE
        self.record = StepRecord(self.path, next_step)
        self.tracker: Tracker = (
            open_tracker(job.settings, job.title, identity=job.run, journal=work.path) if job.run else NullTracker()
        )
        self.tracker.tags(hardware_tags(world_size))
        self.progress = StepProgress(f"stage {job.stage.number} ({job.stage.title})", next_step, job.num_steps)
        self.progress_file = work.path / PROGRESS_FILE
        self.pending: list[_Step] = []
        self.clock = time.perf_counter()
        self._predictor: SamplePredictor | None = None
        self._losses: list[float] = []
        psutil.cpu_percent()  # the first call only starts the clock

    def compiling(self) -> None:
        """Say that the first step takes longer than the others."""
        self.clock = time.perf_counter()
        self._show(f"{self.progress.title}: compiling the layers in the first step")

    def compiled(self) -> None:
        """Say how long the first step took; it does not count in the time left."""
        seconds = time.perf_counter() - self.clock
        logger.info("the first step took %.1f s, in which the layers were compiled", seconds)
        self._show(f"{self.progress.title}: layers compiled in {seconds:.0f} s")
        self.progress.began = self.clock = time.perf_counter()

    def add(self, batch: StepBatch, result: StepResult, learning_rate: float) -> None:
        """Take a finished step; nothing is read from the device."""
        self.pending.append(_Step(batch, result, learning_rate))

    def add_skipped(self, batch: StepBatch, learning_rate: float) -> None:
        """Take a step that was not computed, because the guard leaves its data out."""
        zeros, nan = torch.zeros(len(self.job.stage.sources)), torch.tensor(math.nan, dtype=torch.float64)
        skipped = torch.ones(())
        self.add(batch, StepResult(nan, zeros, zeros, nan, skipped, skipped.bool(), 0.0), learning_rate)

    def write_pending(self, part_norms: dict[str, float]) -> None:
        """Read the losses of the steps since the last call from the device, and report them.

        Args:
            part_norms: gradient norms of the newest step.
        """
        if not self.pending:
            return
        losses = [float(step.result.loss) for step in self.pending]  # waits for the device, once
        rates = self._rates()
        newest = self.pending[-1]
        for step, loss in zip(self.pending, losses, strict=True):
            is_newest = step is newest
            self._write(step, loss, part_norms if is_newest else {}, rates if is_newest else {})
        self._losses += losses
        line = self.progress.line(
            newest.batch.step + 1,
            losses[-1],
            newest.learning_rate,
            rates["samples_per_second"],
            rates["data_wait_share"],
        )
        self._show(line)
        self.pending.clear()

    def _show(self, line: str) -> None:
        """Write the progress line, which the driver shows; training continues without it."""
        with suppress(OSError):
            self.progress_file.write_text(line)
            self.work.publish_soon(PROGRESS_FILE)

    def _rates(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self.clock, 1e-9)
        self.clock = now
        batches = [step.batch for step in self.pending]
        tokens = sum(micro.num_real for batch in batches for micro in batch.micro_batches)
        rates = {
            "tokens_per_second": tokens * self.world_size / seconds,  # the other ranks' shares are about as large
            "samples_per_second": sum(len(batch.sample_ids) for batch in batches) / seconds,
            "data_wait_share": min(1.0, sum(batch.wait_s for batch in batches) / seconds),
            "reduce_share": min(1.0, sum(step.result.reduce_s for step in self.pending) / seconds),
            "system/memory_gb": psutil.Process().memory_info().rss / 1e9,
            "system/cpu_percent": psutil.cpu_percent(),
        }
        if torch.cuda.is_initialized():
            rates["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return rates

    def _write(self, step: _Step, loss: float, part_norms: dict[str, float], rates: dict[str, float]) -> None:
        """Record a step; ``part_norms`` and ``rates`` are known at the newest of the steps that are read together."""
        batch, result = step.batch, step.result
        names = [source.name for source in self.job.stage.sources]
        sums, counts = result.source_loss_sums.tolist(), result.source_tokens.tolist()
        per_source = {f"loss/{n}": s / c for n, s, c in zip(names, sums, counts, strict=True) if c}
        entry: StepEntry = {
            "step": batch.step,
            "loss": loss,
            "loss_hex": loss.hex(),
            "lr": step.learning_rate,
            "grad_norm": float(result.grad_norm),
            "skipped": bool(result.skipped),
            "sample_ids": batch.sample_ids,
        }
        if part_norms:
            entry["part_norms"] = part_norms
        self.record.write(entry)
        values = {"loss": loss, "lr": step.learning_rate, "grad_norm": entry["grad_norm"], **per_source, **rates}
        values |= {f"norms/{part}": norm for part, norm in part_norms.items()}
        if entry["skipped"]:
            values["skipped"] = 1.0
        self.tracker.metrics(values, batch.step)

    def evaluation(self, found: Evaluation, history: HeldOutHistory) -> None:
        """Report loss and scores of the held-out rows."""
        if history.newest_is_of_other_rows:
            logger.warning(
                "held-out rows from step %d on are others than before (eval_data or eval_rows changed): their losses "
                "cannot be compared; `rows` in held_out.jsonl tells them apart.",
                found["step"],
            )
        history.write(self.path.with_name(HELD_OUT_FILE))
        values = {f"loss/held_out/{name}": loss for name, loss in found["sources"].items()}
        values |= {f"score/held_out/{name}": score for name, score in found["scores"].items()}
        self.tracker.metrics({"loss/held_out": found["loss"], **values}, found["step"])
        best = history.best
        note = "the least so far" if best is found else f"least {best['loss']:.4f} after step {best['step']}"
        scores = "".join(f", {name} {score:.1f}%" for name, score in found["scores"].items())
        logger.info("held-out loss after step %d: %.4f (%s)%s", found["step"], found["loss"], note, scores)
        self._show(f"{self.progress.title}: held-out loss {found['loss']:.3f} after step {found['step']} ({note})")
        self.clock = time.perf_counter()  # this was no training

    def rewind_held_out(self, history: HeldOutHistory) -> None:
        """Drop evaluations that will be done again."""
        path = self.path.with_name(HELD_OUT_FILE)
        if history.evaluations or path.is_file():
            history.write(path)

    def predictions(self, model: TinyGPTVForConditionalGeneration, step: int) -> None:
        """Log the model's answers to the same few samples; a step that is done again is not asked again."""
        path = self.work.path / PREDICTIONS_FOLDER / f"step_{step + 1:06d}.json"
        if isinstance(self.tracker, NullTracker) or path.is_file():
            return
        if self._predictor is None:
            self._predictor = SamplePredictor(BatchMaker(self.job.plan))
        try:
            answers = self._predictor.predict(model)
            path.parent.mkdir(exist_ok=True)
            write_json(path, [{**vars(answer), "image": None} for answer in answers])
        except Exception:  # a look at the answers must not stop training
            logger.exception("no sample predictions at step %d", step + 1)
            return
        self.tracker.table([vars(answer) for answer in answers], f"predictions/{path.stem}")
        for number, answer in enumerate(answers):
            if answer.image is not None:
                self.tracker.image(answer.image, f"predictions/{number}", step)
        self.clock = time.perf_counter()  # this was no training

    def flush(self) -> float:
        """Have the record and what waits for the tracker on disk: whoever resumes at a state of now does no step again.

        Returns:
            Mean of the finite losses since the last call; infinite where there is none.
        """
        self.record.flush()
        self.tracker.keep()
        losses = [loss for loss in self._losses if math.isfinite(loss)]
        self._losses.clear()
        return sum(losses) / len(losses) if losses else math.inf

    def rewind(self, next_step: int) -> None:
        """Drop the steps from ``next_step`` on: they will be done again."""
        self.record.close()
        self.pending.clear()
        self._losses.clear()
        self.record = StepRecord(self.path, next_step)

    @property
    def last_loss(self) -> float:
        """Loss of the newest step that was read."""
        return self.record.last_loss

    def abort(self) -> None:
        """Close everything before the end of the stage; the tracker's run is marked as failed."""
        with suppress(OSError, storage.DiskFullError):  # half a line is dropped when the run resumes
            self.record.close()
        self.tracker.close("FAILED")

    def finish(
        self, checkpoint: str, cut: dict[str, CutCount], steps: int, held_out: HeldOutResult | None
    ) -> WorkerResult:
        """Close everything.

        Args:
            checkpoint: folder or URI of the final checkpoint.
            cut: samples of the whole stage that were longer than its limits, by source.
            steps: optimizer steps that were done.
            held_out: losses of the held-out rows; None without them.
        """
        self.record.close()
        self.tracker.tags({f"cut.{name}": cut_sentence(name, count) for name, count in cut.items() if count.questions})
        self.tracker.close()
        stopped_early = steps < self.job.num_steps
        return WorkerResult(
            checkpoint, self.record.first_loss, self.record.last_loss, steps, cut, held_out, stopped_early
        )
