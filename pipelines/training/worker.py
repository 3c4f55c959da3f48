"""The loop of one training worker: batch, loss, update, report, save.

Every worker runs it; rank 0 writes files. The stage is data: nothing here asks for its number.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections import Counter
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from pipelines import storage
from pipelines.data.loader import BatchMaker, CutCount, StepBatch, iterate_steps
from pipelines.json_files import to_json
from pipelines.node_cache import local_checkpoint
from pipelines.redact import redact
from pipelines.training.distributed import gather, rank, world_size
from pipelines.training.fit import current_card, fit_to_device
from pipelines.training.guard import Diagnosis, Fault, Guard, TrainingStopped, describe, diagnose
from pipelines.training.held_out import HeldOutRows
from pipelines.training.held_out_record import HeldOutHistory, parse_evaluation
from pipelines.training.job import TrainJob
from pipelines.training.record import GUARD_FILE, WORKER_FILES
from pipelines.training.reporter import Reporter
from pipelines.training.result import WorkerResult
from pipelines.training.run_reports import NoReports, RunReports
from pipelines.training.stage_model import build_model
from pipelines.training.states import StateStore, collect_state, restore_parameters, restore_state
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.checkpoint.folders import MANIFEST, remove_leftovers
from tinygptv.checkpoint.stage_record import StageRecord
from tinygptv.checkpoint.stored_weights import unrounded_encoder
from tinygptv.quantization.frozen_linear import unpack_frozen
from tinygptv.training.optim import build_optimizer
from tinygptv.training.train_step import StepResult, TrainStep

logger = logging.getLogger(__name__)


def train_loop(job: TrainJob, reports: RunReports | None = None) -> WorkerResult | None:
    """Train from the newest training state, or from the start, to the end of the stage.

    Args:
        job: what to train.
        reports: Ray Train's side of the run; None where there is none.

    Returns:
        The result on rank 0; None on other ranks.

    Raises:
        TrainingStopped: the guard found a fault that its settings do not allow.
    """
    worker = TrainWorker(job, reports or NoReports())
    try:
        next_step = worker.resume()
        while next_step < worker.end:
            next_step = worker.train(next_step)  # to the end, or back to a state where the guard rolls back
        return worker.finish()
    except BaseException:
        worker.abort()
        raise


class TrainWorker:
    """One worker's model, optimizer, data and guard."""

    def __init__(self, job: TrainJob, reports: RunReports) -> None:
        job = fit_to_device(job, current_card() if job.settings.use_gpu else None)
        self.job = job
        self.rank, self.world_size = rank(), world_size()
        settings = job.settings
        torch.set_num_threads(settings.threads_per_worker or max(1, (os.cpu_count() or 1) // self.world_size))
        torch.manual_seed(settings.seed)  # fresh LoRA adapters must be the same on every worker
        self.model, self.processor = build_model(job)
        self.guard = Guard(
            spike=settings.guard_spike,
            vanishing=settings.guard_vanishing,
            patience=settings.guard_patience,
            device=self.model.device,
        )
        self.train_step = TrainStep(
            self.model,
            build_optimizer(self.model, job.stage.schedule, job.stage.weight_decay, job.stage.beta2),
            num_sources=len(job.stage.sources),
            precision=settings.precision,
            encoder_precision=settings.encoder_precision,
            max_grad_norm=job.stage.max_grad_norm,
            reject=None if settings.guard == "off" else self.guard.reject,
            compile=settings.compile,
        )
        self.plan = job.plan.for_worker(self.rank, self.world_size)
        self.store = StateStore(
            storage.join(job.storage, "states"),
            settings.keep_checkpoints,
            keep_best=settings.keep_best or settings.use_best,
        )
        self.work = storage.WorkFolder(job.storage)
        self.held_out = HeldOutRows(settings, self.plan, self.train_step) if job.evaluates else None
        self.history = HeldOutHistory()
        self.end = job.num_steps
        self.compiling = False
        self.reports = reports
        self.reporter: Reporter | None = None
        self.cut: dict[str, CutCount] = {}
        self.left_out: set[int] = set()
        self.rollbacks: Counter[int] = Counter()

    def resume(self) -> int:
        """Restore the newest state; returns the step to continue with."""
        next_step = self._restore()
        if self.rank == 0:
            self.work.fetch(*WORKER_FILES)  # another node may have begun
            self.reporter = Reporter(self.job, self.work, next_step, self.world_size)
            self.reporter.rewind_held_out(self.history)
        if self.held_out and next_step in (0, self.end) and not self.history.has(next_step):
            self._evaluate(next_step)
        if self.rank == 0 and next_step == 0 and (self.job.settings.guard == "rollback" or self.job.settings.use_best):
            self.save(0)  # something to go back to
        return next_step

    def train(self, start: int) -> int:
        """Train from step ``start``; returns ``end``, or the step that the guard rolled back to."""
        settings = self.job.settings
        batches = iterate_steps(
            self.plan,
            start,
            self.job.num_steps,
            loader_workers=settings.loader_workers,
            prefetch_steps=settings.prefetch_steps,
        )
        self.compiling = self.train_step.compiled
        if self.compiling and self.reporter:
            self.reporter.compiling()
        for batch in batches:
            self._step(batch)
            done, last = batch.step + 1, batch.step + 1 == self.job.num_steps
            saves = done % settings.checkpoint_every == 0 and not last
            evaluates = self.held_out and _due(batch.step, settings.eval_every or settings.checkpoint_every, last)
            reads = saves or last or bool(evaluates) or done % settings.log_every == 0
            leaves = reads and not last and self.reports.must_save()
            saves = saves or leaves
            if reads:
                rolled_back_to = self._check_steps()
                if rolled_back_to is not None:
                    batches.close()
                    return rolled_back_to
            if evaluates:
                self._evaluate(done)
                last = last or self._stops_early(done)
                saves = (saves or self.history.newest_is_best) and not last
            if saves or last:
                self.cut = self._gather_cut()
            if saves:
                self._save_and_report(done, waits=leaves)
            if self.reporter and _due(batch.step, settings.predict_every, last):
                self.reporter.predictions(self.model, batch.step)
            if last:
                break
        batches.close()
        return self.end

    def _evaluate(self, steps_done: int) -> None:
        """Compute loss and scores of the held-out rows; all workers do."""
        assert self.held_out is not None
        found = self.history.add(steps_done, gather(self.held_out.share()))
        if self.reporter:
            self.reporter.evaluation(found, self.history)

    def _stops_early(self, steps_done: int) -> bool:
        patience = self.job.settings.early_stop
        if not patience or self.history.since_best < patience:
            return False
        self.end = steps_done
        if self.rank == 0:
            logger.info("early stop after step %d: %d evaluations without a lower loss", steps_done, patience)
        return True

    def _step(self, batch: StepBatch) -> None:
        """Do one optimizer step, unless the guard leaves its data out."""
        learning_rate = self.job.stage.schedule.learning_rate(batch.step)
        self.cut = add_counts(self.cut, batch.cut)
        if batch.step in self.left_out:
            if self.reporter:
                self.reporter.add_skipped(batch, learning_rate)
            return
        _seed(_dropout_seed(self.job.settings.seed, batch.step, self.rank))
        result = self.train_step.run(batch.micro_batches, learning_rate)
        self._report(batch, result, learning_rate)
        if self.compiling and self.reporter:
            self.reporter.compiled()
        self.compiling = False

    def _report(self, batch: StepBatch, result: StepResult, learning_rate: float) -> None:
        if self.job.settings.guard != "off":
            self.guard.watch(batch.step, result)
        if self.reporter:
            self.reporter.add(batch, result, learning_rate)

    def _check_steps(self) -> int | None:
        """Read the numbers of the last steps from the device; returns the step that the guard rolled back to, if it
        did."""
        part_norms = self.train_step.part_norms()
        if self.reporter:
            self.reporter.write_pending(part_norms)
        faults = self.guard.check(self.train_step, part_norms)
        return self._handle(faults) if faults else None

    def _handle(self, faults: list[Fault]) -> int | None:
        """Log faults and do what the setting ``guard`` says; returns the step that was rolled back to, if any."""
        settings = self.job.settings
        out_of_patience = self.guard.faults_in_a_row >= settings.guard_patience
        sentences = []
        for fault in faults[: settings.guard_patience]:
            diagnosis = self._diagnose(fault)
            sentences.append(describe(fault, diagnosis))
            if self.rank == 0:
                logger.warning("guard (%s): %s", settings.guard, sentences[-1])
                line = to_json({**asdict(fault), **asdict(diagnosis), "action": settings.guard}) + "\n"
                path = self.work.path / GUARD_FILE
                with storage.disk_full_as_error(path), path.open("a") as stream:
                    stream.write(line)
        if settings.guard == "stop" or out_of_patience:
            more = f"; {self.guard.faults_in_a_row} steps in a row failed" if out_of_patience else ""
            raise TrainingStopped(
                f"the guard stopped training at {sentences[0]}{more}. The same command resumes from the last training "
                "state; guard=skip leaves such steps out, guard=rollback returns to the state before them."
            )
        bad_steps = {fault.step for fault in faults if fault.kind != "vanishing_gradient"}
        if settings.guard != "rollback" or not bad_steps:
            return None
        return self._roll_back(bad_steps)

    def _roll_back(self, bad_steps: set[int]) -> int:
        self.left_out |= bad_steps
        self.store.wait()
        if self.world_size > 1:
            dist.barrier()
        next_step = self._restore()
        self.rollbacks[next_step] += 1
        if self.rollbacks[next_step] > self.job.settings.guard_patience:
            raise TrainingStopped(f"the guard rolled back to step {next_step} {self.rollbacks[next_step]} times.")
        if self.reporter:
            logger.warning(
                "guard: rolled back to step %d; the data of steps %s is left out", next_step, sorted(bad_steps)
            )
            self.reporter.rewind(next_step)
            self.reporter.rewind_held_out(self.history)
        return next_step

    def _diagnose(self, fault: Fault) -> Diagnosis:
        """Compute a step's samples again one by one, to find those that cause the fault, over all workers."""
        if fault.kind == "vanishing_gradient":
            return Diagnosis(layer=fault.part, where="backward")
        maker = BatchMaker(replace(self.plan, micro_batch_size=1, micro_batch_tokens=0, pack_length=0))
        ids = maker.sample_ids(fault.step)[self.rank :: self.world_size]
        refs = maker.mixture.rank_step(fault.step, self.rank, self.world_size)
        # One at a time: together they would be put in the order of their lengths.
        batches = [maker.batch([maker.load(ref)])[0] for ref in refs]
        torch.manual_seed(_dropout_seed(self.job.settings.seed, fault.step, self.rank))
        found = diagnose(self.train_step, list(zip(ids, batches, strict=True)), spike=fault.kind == "spike")
        return Diagnosis.merge(gather(found))

    def _save_and_report(self, next_step: int, *, waits: bool) -> None:
        """Save a state on rank 0, and report the newest whole one; ``waits`` for this one to be whole."""
        if self.rank == 0:
            self.save(next_step)
            if waits:
                logger.warning("a machine of this run will be taken: the state of step %d is saved", next_step)
                self.store.wait()
        whole = next_step if waits else self.store.whole_step
        metrics = {"next_step": float(next_step), "loss": self.reporter.last_loss if self.reporter else math.nan}
        self.reports.saved(
            {**metrics, "saved_step": float(whole)}, self.store.folder(whole) if whole and self.rank == 0 else ""
        )

    def save(self, next_step: int) -> None:
        """Save a training state in the background; called on rank 0."""
        assert self.reporter is not None
        mean_loss = self.reporter.flush()
        self.work.publish(*WORKER_FILES)  # first: a record may be ahead of the state, never behind it
        tensors, record = collect_state(self.train_step)
        tensors |= {f"guard/{name}": tensor for name, tensor in self.guard.state().items()}
        record["mean_loss"] = mean_loss if math.isfinite(mean_loss) else None
        record["cut"] = {name: asdict(count) for name, count in self.cut.items()}
        self.store.save(next_step, tensors, {**record, **self.history.state(next_step)})

    def _gather_cut(self) -> dict[str, CutCount]:
        """Cut samples of all workers on rank 0; other ranks count again from zero."""
        found = gather(self.cut)
        return add_counts(*found) if self.rank == 0 else {}

    def _restore(self) -> int:
        self.cut, self.history = {}, HeldOutHistory(rows=self.held_out.digest if self.held_out else "")
        found = self.store.newest()
        if found is None:
            return 0
        next_step, tensors, record = found
        restore_state(self.train_step, tensors, record)
        self.history.evaluations = [parse_evaluation(each) for each in record.get("evaluations", [])]
        if self.rank == 0:
            self.cut = {name: CutCount(**count) for name, count in record.get("cut", {}).items()}
        prefix = "guard/"
        self.guard.load_state({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        return next_step

    def abort(self) -> None:
        """Close everything so that another run can resume; the error that ends this one stays the one that is told."""
        if self.reporter:
            try:
                self.store.wait()
            except (OSError, storage.DiskFullError) as error:
                logger.warning("the newest training state was not written: %s", error)
            self.reporter.abort()
            self.work.publish(*WORKER_FILES)

    def finish(self) -> WorkerResult | None:
        """Write the whole checkpoint on rank 0; other ranks return None."""
        if self.reporter is None:
            return None
        self.store.wait()
        self.reporter.flush()
        step = self._use_best() if self.job.settings.use_best else self.end
        held_out = None
        if self.held_out:
            held_out = self.history.result(step, self.held_out.num_rows, self.held_out.questions.num_questions)
        checkpoint = self._save_checkpoint()
        reporter, self.reporter = self.reporter, None  # from here on it is closed
        result = reporter.finish(checkpoint, self.cut, self.end, held_out)
        self.work.publish(*WORKER_FILES)
        return result

    def _use_best(self) -> int:
        """Restore the weights of the least held-out loss; returns the steps that they were trained for."""
        step = self.history.best["step"]
        if step != self.end:
            _, tensors, _ = self.store.at(step)
            restore_parameters(self.train_step, tensors)
        return step

    def _save_checkpoint(self) -> str:
        """Write the whole model; returns its folder or URI."""
        folder = self.work.path / "checkpoint"
        remove_leftovers(folder)
        with storage.disk_full_as_error(folder):
            start = local_checkpoint(self.job.settings.init_from)
            unpack_frozen(self.model, start)
            encoder = unrounded_encoder(self.model, start)
            save_checkpoint(folder, self.model, self.processor, self._stage_record(), encoder)
            if not self.work.location.is_local:
                storage.upload_folder(folder, self.work.location / "checkpoint", MANIFEST)
                shutil.rmtree(folder)
        return self.work.uri("checkpoint")

    def _stage_record(self) -> StageRecord:
        """``stage.json`` of the checkpoint."""
        job = self.job
        record: StageRecord = {
            "recipe": job.settings.recipe,
            "stage": job.stage.number,
            "title": job.stage.title,
            "steps": self.end,
            "seed": job.settings.seed,
            "init_from": redact(job.settings.init_from),
        }
        if job.run and job.run.parent:
            record["tracking_parent"] = job.run.parent
        return record


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or (step + 1) % every == 0)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout depends on the step alone, so that a resumed run draws what an uninterrupted one would."""
    return (seed * 1_000_003 + step) * 1009 + rank


def _seed(seed: int) -> None:
    """``torch.manual_seed``, which formats its callers three times where no GPU is in use: a tenth of a tiny step."""
    (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(seed)


def add_counts(*counts: dict[str, CutCount]) -> dict[str, CutCount]:
    """Sums by source."""
    total: dict[str, CutCount] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, CutCount()) + count
    return total
