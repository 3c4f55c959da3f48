"""A training worker whose model is not there, with a store, a reporter and reports that note what they are told."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import torch

from pipelines.settings import TrainSettings
from pipelines.storage import WorkFolder
from pipelines.training.guard import Guard
from pipelines.training.held_out import HeldOutShare
from pipelines.training.held_out_record import HeldOutHistory
from pipelines.training.job import TrainJob
from pipelines.training.run_reports import NoReports
from pipelines.training.worker import TrainWorker
from tinygptv.training.stages import get_stage

STAGE = get_stage("mini", 4)
TENSORS = {"parameter/x": torch.ones(2)}


class Store:
    """A store of states that are whole at once, or when they are waited for."""

    def __init__(self, notes, found=None):
        self.notes, self.found, self.whole_step, self.saved = notes, found, 0, {}

    def newest(self):
        return self.found

    def at(self, step):
        self.notes.append(("state", step))
        return step, {"weights of": step}, {}

    def save(self, step, tensors, record):
        self.notes.append(("state of", step))
        self.saved[step] = (tensors, record)

    def wait(self):
        self.notes.append("wait")
        self.whole_step = max(self.saved, default=0)

    def folder(self, step):
        return f"states/{step}"


class Reporter:
    """Notes what it is told."""

    last_loss = 1.5

    def __init__(self, notes):
        self.notes, self.mean_loss = notes, 2.5

    def __getattr__(self, name):
        def note(*arguments):
            self.notes.append((name, *arguments))
            return self.mean_loss

        return note


class Reports(NoReports):
    """Keeps what is saved; a notice comes at the reading of this number."""

    def __init__(self, notice_at=0):
        self.notice_at, self.asked, self.told = notice_at, 0, []

    def saved(self, metrics, location):
        self.told.append((metrics, location))

    def must_save(self):
        self.asked += 1
        return self.asked == self.notice_at


class Scripted(TrainWorker):
    """A worker whose model is not there: it notes what it would do."""

    def __init__(self, folder, num_steps=10, *, losses=(), reports=None, found=None, rank=0, **changes):
        settings = TrainSettings(output=str(folder), num_workers=0, log_every=100, predict_every=0, **changes)
        self.job = TrainJob(settings, STAGE, None, num_steps, str(folder))
        self.notes, self.losses = [], dict(losses)
        self.rank, self.world_size, self.end, self.plan = rank, 1, num_steps, None
        self.model = self.processor = None
        self.train_step = SimpleNamespace(compiled=False, run=self._run, part_norms=lambda: {"lora": 0.5})
        self.guard = Guard(spike=8.0, vanishing=0.0, patience=2, device=torch.device("cpu"))
        self.store, self.reporter = Store(self.notes, found), Reporter(self.notes) if rank == 0 else None
        self.work = WorkFolder(str(folder))
        self.work.publish = lambda *names: self.notes.append(("publish", *names))
        self.reports = reports or NoReports()
        self.held_out = SimpleNamespace(
            share=self._share,
            num_rows={"q": 4},
            questions=SimpleNamespace(num_questions={}),
        )
        self.history, self.compiling = HeldOutHistory(), False
        self.cut, self.left_out, self.rollbacks = {}, set(), Counter()
        self.faults = []

    def _run(self, batches, rate):
        self.notes.append(("run", batches, rate, torch.initial_seed()))
        return "result"

    def _share(self):
        return HeldOutShare({"q": (2 * self.losses.get(self.step_done, 9.0), 2)}, {})

    def _evaluate(self, steps_done):
        self.step_done = steps_done
        super()._evaluate(steps_done)

    def _check_steps(self):
        self.notes.append("read")
        return self._handle(self.faults) if self.faults else None
