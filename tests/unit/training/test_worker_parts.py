"""What a worker is built from, what it reads, and what it tells its parts; nothing is computed here."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pipelines import storage
from pipelines.data.loader import StepBatch
from pipelines.settings import TrainSettings
from pipelines.training import worker as module
from pipelines.training.guard import Diagnosis, Fault, TrainingStopped
from pipelines.training.held_out import HeldOutShare
from pipelines.training.job import TrainJob
from pipelines.training.record import WORKER_FILES
from pipelines.training.run_reports import NoReports
from pipelines.training.worker import TrainWorker, _dropout_seed
from tests.scripted_worker import STAGE, Reporter, Reports, Scripted


class Plan:
    """A plan that knows its worker, and is copied like a dataclass."""

    def __init__(self, worker=None):
        self.worker = worker

    def for_worker(self, rank, size):
        return Plan((rank, size))


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Build a worker whose parts are replaced by what they were made with."""

    def build(*, rank=0, size=1, **changes):
        told = {}

        def keep(name, result=None):
            def call(*arguments, **options):
                told[name] = (*arguments, *([options] if options else []))
                return result if result is not None else SimpleNamespace(made=name)

            return call

        model = SimpleNamespace(device=torch.device("cpu"))
        monkeypatch.setattr(module, "rank", lambda: rank)
        monkeypatch.setattr(module, "world_size", lambda: size)
        monkeypatch.setattr(module.os, "cpu_count", lambda: 8)
        monkeypatch.setattr(torch, "set_num_threads", keep("threads"))
        monkeypatch.setattr(torch, "manual_seed", keep("seed"))
        monkeypatch.setattr(module, "fit_to_device", lambda job, card: told.update(card=card) or job)
        monkeypatch.setattr(module, "current_card", lambda: "H100")
        monkeypatch.setattr(module, "build_model", lambda job: told.update(order=list(told)) or (model, "processor"))
        monkeypatch.setattr(module, "build_optimizer", keep("optimizer", "adamw"))
        monkeypatch.setattr(module, "TrainStep", keep("step"))
        monkeypatch.setattr(module, "HeldOutRows", keep("held_out"))
        stage = replace(STAGE, weight_decay=0.03, beta2=0.97, max_grad_norm=0.7)
        settings = TrainSettings(output=str(tmp_path), num_workers=0, **changes)
        worker = TrainWorker(TrainJob(settings, stage, Plan(), 12, str(tmp_path)), NoReports())
        return worker, told, stage, model

    return build


def test_each_part_gets_its_own_settings(built):
    worker, told, stage, model = built(
        rank=1,
        size=3,
        seed=7,
        precision="bf16",
        encoder_precision="fp32",
        compile="off",
        guard_spike=5.0,
        guard_vanishing=1e-4,
        guard_patience=4,
        eval_fraction=0.1,
        threads_per_worker=5,
    )
    assert told["threads"] == (5,) and told["seed"] == (7,) and told["card"] is None
    assert "seed" in told["order"], "before adapters are drawn"
    assert (worker.guard.spike, worker.guard.vanishing, worker.guard.patience) == (5.0, 1e-4, 4)
    assert told["optimizer"] == (model, stage.schedule, 0.03, 0.97)
    assert told["step"] == (
        model,
        "adamw",
        {
            "num_sources": len(stage.sources),
            "precision": "bf16",
            "encoder_precision": "fp32",
            "max_grad_norm": 0.7,
            "reject": worker.guard.reject,
            "compile": "off",
        },
    )
    assert worker.plan.worker == (1, 3)
    assert told["held_out"] == (worker.job.settings, worker.plan, worker.train_step)
    assert (worker.rank, worker.world_size, worker.end, worker.processor) == (1, 3, 12, "processor")


def test_states_and_files_lie_where_all_workers_reach_them(built, tmp_path):
    shared = tmp_path / "shared"
    worker, *_ = built(storage_path=str(shared), keep_checkpoints=7)
    assert (worker.store.location, worker.work.path, worker.store.keep) == (f"{shared}/states", shared, 7)
    alone, *_ = built()
    assert (alone.store.location, alone.work.path) == (f"{tmp_path}/states", tmp_path)


@pytest.mark.parametrize(("size", "threads"), [(1, 8), (3, 2), (9, 1)])
def test_workers_of_a_machine_share_its_cores(built, size, threads):
    assert built(size=size)[1]["threads"] == (threads,)


def test_a_gpus_memory_is_asked_for_where_one_is_used(built):
    worker, told, _, _ = built(use_gpu=True)
    assert told["card"] == "H100" and worker.held_out is None


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("rank", [0, 1])
def test_the_record_is_fetched_before_it_is_opened_at_the_step_that_comes_next(tmp_path, monkeypatch, rank):
    worker = Scripted(tmp_path, rank=rank, found=None)
    worker.reporter, worker.held_out, worker.world_size = None, None, 3
    worker.work.fetch = lambda *names: worker.notes.append(("fetch", *names))
    monkeypatch.setattr(worker, "_restore", lambda: worker.notes.append("restore") or 4)

    def open_reporter(*arguments):
        worker.notes.append(("open", *arguments))
        return Reporter(worker.notes)

    monkeypatch.setattr(module, "Reporter", open_reporter)
    assert worker.resume() == 4
    opened = [
        ("fetch", *WORKER_FILES),
        ("open", worker.job, worker.work, 4, 3),
        ("rewind_held_out", worker.history),
    ]
    assert worker.notes == ["restore", *(opened if rank == 0 else [])]
    assert (worker.reporter is None) == (rank == 1)


# ---------------------------------------------------------------------- batches


class Batches:
    """An iterator over steps that notes how it was asked for and that it was closed."""

    def __init__(self, plan, start, stop, **options):
        self.asked, self.steps, self.closed = (plan, start, stop, options), iter(range(start, stop)), 0

    def __iter__(self):
        return self

    def __next__(self):
        return StepBatch(next(self.steps), [], [], {})

    def close(self):
        self.closed += 1


@pytest.fixture
def batches(monkeypatch):
    made = []
    monkeypatch.setattr(module, "iterate_steps", lambda *a, **k: made.append(Batches(*a, **k)) or made[-1])
    monkeypatch.setattr(module, "collect_state", lambda step: ({}, {"scaler": {}}))
    return made


def test_batches_are_read_ahead_from_the_step_and_closed_at_the_end(tmp_path, batches):
    worker = Scripted(tmp_path, 6, checkpoint_every=99, loader_workers=3, prefetch_steps=5)
    worker.held_out, worker.plan = None, "plan"
    assert worker.train(2) == 6
    (made,) = batches
    assert made.asked == ("plan", 2, 6, {"loader_workers": 3, "prefetch_steps": 5}) and made.closed == 1


def test_batches_are_closed_where_training_stops_early_or_goes_back(tmp_path, batches, monkeypatch):
    worker = Scripted(tmp_path, checkpoint_every=2, early_stop=1, eval_fraction=0.1, losses={2: 1.0})
    assert worker.train(0) == 4 and batches[0].closed == 1
    monkeypatch.setattr(worker, "_check_steps", lambda: 2)
    assert worker.train(4) == 2 and batches[1].closed == 1


def test_the_first_step_of_each_pass_is_told_as_the_one_that_compiles(tmp_path, batches):
    worker = Scripted(tmp_path, 3, checkpoint_every=99)
    worker.held_out, worker.train_step.compiled = None, True
    worker.train(0)
    told = [note[0] for note in worker.notes if isinstance(note, tuple)]
    assert told[:4] == ["compiling", "run", "add", "compiled"] and told.count("compiled") == 1
    plain = Scripted(tmp_path, 3, checkpoint_every=99)
    plain.held_out = None
    plain.train(0)
    assert not {"compiling", "compiled"} & {note[0] for note in plain.notes if isinstance(note, tuple)}


def test_predictions_are_of_the_step_that_was_done_and_of_the_model(tmp_path, batches):
    worker = Scripted(tmp_path, 5, checkpoint_every=99)
    worker.held_out, worker.model = None, "model"
    worker.job = replace(worker.job, settings=worker.job.settings.model_copy(update={"predict_every": 2}))
    worker.train(0)
    assert [note for note in worker.notes if note[0] == "predictions"] == [
        ("predictions", "model", step) for step in (1, 3, 4)
    ]


@pytest.mark.parametrize(("guard", "watched"), [("skip", [4]), ("rollback", [4]), ("stop", [4]), ("off", [])])
def test_the_guard_watches_whatever_is_done_at_a_fault(tmp_path, guard, watched):
    worker = Scripted(tmp_path, guard=guard)
    worker._report(StepBatch(4, [], [], {}), "result", 1e-3)
    assert [(step, result) for step, result in worker.guard._waiting] == [(step, "result") for step in watched]


def test_the_first_state_that_is_told_is_a_whole_one(tmp_path, batches):
    """Until one is whole, none is named."""
    reports = Reports()
    worker = Scripted(tmp_path, 9, checkpoint_every=4, reports=reports)
    worker.held_out = None
    worker.train(0)
    assert [(metrics["next_step"], metrics["saved_step"], location) for metrics, location in reports.told] == [
        (4, 0, ""),
        (8, 0, ""),
    ]


# ---------------------------------------------------------------------- reading, evaluating


def test_a_reading_gives_the_same_norms_to_the_record_and_to_the_guard(tmp_path):
    for rank, faults in itertools.product((0, 1), ([], [Fault(3, "spike", 9.0, 0.5)])):
        worker, read = Scripted(tmp_path, rank=rank), []
        worker.train_step.part_norms = lambda read=read: read.append(1) or {"lora": 0.25}
        worker.guard.check = lambda *a, worker=worker, faults=faults: worker.notes.append(("check", *a)) or faults
        worker._handle = lambda faults: ("handled", *faults)
        assert TrainWorker._check_steps(worker) == (("handled", *faults) if faults else None)
        checked = ("check", worker.train_step, {"lora": 0.25})
        assert worker.notes == [*([("write_pending", {"lora": 0.25})] if rank == 0 else []), checked]
        assert read == [1], "the device is read once"


def test_an_evaluation_adds_up_all_workers_and_is_told(tmp_path, monkeypatch):
    shares = [HeldOutShare({"q": (3.0, 2)}, {}), HeldOutShare({"q": (5.0, 2)}, {})]
    monkeypatch.setattr(module, "gather", lambda own: shares if own is shares[0] else None)
    worker = Scripted(tmp_path)
    worker.held_out.share = lambda: shares[0]
    TrainWorker._evaluate(worker, 6)
    (found,) = worker.history.evaluations
    assert (found["step"], found["loss"]) == (6, 2.0)
    assert worker.notes == [("evaluation", found, worker.history)]
    other = Scripted(tmp_path, rank=1)
    other.held_out.share = lambda: shares[0]
    TrainWorker._evaluate(other, 6)
    assert other.history.evaluations == [found] and other.notes == []


def test_an_early_stop_says_after_which_step_and_how_many_evaluations(tmp_path, caplog):
    caplog.set_level("INFO")
    worker = Scripted(tmp_path, early_stop=2, eval_fraction=0.1)
    for step, loss, stops in ((0, 2.0, False), (4, 1.0, False), (6, 1.5, False), (8, 1.2, True)):
        worker.history.add(step, [HeldOutShare({"q": (loss, 1)}, {})])
        assert worker._stops_early(step) is stops and worker.end == (8 if stops else 10)
    assert caplog.messages == ["early stop after step 8: 2 evaluations without a lower loss"]


# ---------------------------------------------------------------------- faults


def test_other_ranks_write_no_fault_and_stop_with_the_same_words(tmp_path):
    fault = Fault(3, "spike", 9.0, 0.5)
    said = []
    for rank in (0, 1):
        worker = Scripted(tmp_path / str(rank), rank=rank, guard="stop")
        worker.work.path.mkdir(exist_ok=True, parents=True)
        worker._diagnose = lambda fault: Diagnosis(samples=["a/1"])
        with pytest.raises(TrainingStopped) as stopped:
            worker._handle([fault, fault])
        said.append(str(stopped.value))
        assert (worker.work.path / "guard.jsonl").exists() == (rank == 0)
    assert (
        said[0]
        == said[1]
        == (
            "the guard stopped training at step 3: the loss jumps (loss 9, gradient norm 0.5); samples a/1. The same "
            "command resumes from the last training state; guard=skip leaves such steps out, guard=rollback returns to "
            "the state before them."
        )
    )


def test_workers_wait_for_each_other_before_they_read_a_state(tmp_path, monkeypatch, caplog):
    worker = Scripted(tmp_path, guard="rollback")
    worker.world_size = 2
    monkeypatch.setattr(module.dist, "barrier", lambda: worker.notes.append("barrier"))
    monkeypatch.setattr(worker, "_restore", lambda: worker.notes.append("restore") or 3)
    assert worker._roll_back({5, 4}) == 3
    assert worker.notes[:3] == ["wait", "barrier", "restore"]
    assert caplog.messages == ["guard: rolled back to step 3; the data of steps [4, 5] is left out"]
    other = Scripted(tmp_path, guard="rollback", rank=1)
    monkeypatch.setattr(other, "_restore", lambda: 3)
    assert other._roll_back({4}) == 3 and other.notes == ["wait"] and other.left_out == {4}


def test_roll_backs_are_counted_for_each_state(tmp_path, monkeypatch):
    worker, states = Scripted(tmp_path, guard_patience=1), iter([3, 6, 3])
    monkeypatch.setattr(worker, "_restore", lambda: next(states))
    assert [worker._roll_back({step}) for step in (4, 7)] == [3, 6]
    with pytest.raises(TrainingStopped, match="rolled back to step 3 2 times"):
        worker._roll_back({5})


@pytest.mark.parametrize("kind", ["spike", "nonfinite_gradient"])
def test_each_worker_computes_its_own_samples_of_the_faulty_step_one_by_one(tmp_path, monkeypatch, kind):
    asked = {}

    class Maker:
        def __init__(self, plan):
            asked["plan"] = plan
            self.mixture = SimpleNamespace(rank_step=lambda *a: asked.update(step=a) or ["x", "y"])

        def sample_ids(self, step):
            return [f"{step}/{number}" for number in range(5)]

        def load(self, ref):
            return f"loaded {ref}"

        def batch(self, loaded):
            (sample,) = loaded
            return [f"batch of {sample}"]

    def find(step, samples, *, spike):
        asked.update(samples=samples, spike=spike, seed=torch.initial_seed(), train_step=step)
        return Diagnosis("layer", "forward", ["7/1"])

    monkeypatch.setattr(module, "BatchMaker", Maker)
    monkeypatch.setattr(module, "diagnose", find)
    monkeypatch.setattr(module, "gather", lambda own: [Diagnosis(samples=["7/0"]), own])
    monkeypatch.setattr(module, "replace", lambda plan, **changes: (plan, changes))
    worker = Scripted(tmp_path, rank=1, seed=3)
    worker.world_size, worker.plan = 3, "plan"
    assert worker._diagnose(Fault(7, kind, 9.0, 0.5)) == Diagnosis("layer", "forward", ["7/0", "7/1"])
    assert asked["plan"] == ("plan", {"micro_batch_size": 1, "micro_batch_tokens": 0, "pack_length": 0})
    assert asked["step"] == (7, 1, 3) and asked["train_step"] is worker.train_step
    assert asked["samples"] == [("7/1", "batch of loaded x"), ("7/4", "batch of loaded y")]
    assert asked["spike"] == (kind == "spike") and asked["seed"] == _dropout_seed(3, 7, 1), "dropout as in the step"


def test_a_vanishing_gradient_needs_no_computation(tmp_path):
    found = Scripted(tmp_path)._diagnose(Fault(3, "vanishing_gradient", 2.0, 0.5, "lora/layer_01"))
    assert found == Diagnosis("lora/layer_01", "backward")


def test_the_largest_seed_gives_one_that_torch_takes():
    torch.Generator().manual_seed(_dropout_seed(2**32 - 1, 10**9, 10**5))


def test_every_seed_step_and_rank_has_its_own_dropout():
    keys = [_dropout_seed(*key) for key in itertools.product(range(3), range(50), range(8))]
    assert len(set(keys)) == len(keys) and _dropout_seed(0, 0, 0) == 0


# ---------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("remote", [False, True])
def test_the_checkpoint_lies_in_the_folder_or_in_the_bucket_alone(tmp_path, monkeypatch, remote):
    saved = []

    def save(folder, *arguments):
        saved.append(arguments)
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(module, "save_checkpoint", save)
    monkeypatch.setattr(module, "local_checkpoint", lambda location: f"local {location}")
    unpacked = []
    monkeypatch.setattr(module, "unpack_frozen", lambda *given: unpacked.append(given))
    monkeypatch.setattr(
        module, "unrounded_encoder", lambda model, start: unpacked and f"encoder of {model} from {start}"
    )
    worker = Scripted(tmp_path)
    worker.model, worker.processor = "model", "processor"
    if remote:
        worker.work = storage.WorkFolder(f"memory://bucket/{tmp_path.name}")
    leftover = worker.work.path / ".checkpoint.12345678.tmp"
    leftover.mkdir()
    found = worker._save_checkpoint()
    assert not leftover.exists(), "of a run that was killed: as large as the model"
    encoder = f"encoder of model from local {worker.job.settings.init_from}"
    assert unpacked == [("model", f"local {worker.job.settings.init_from}")]
    assert saved == [("model", "processor", worker._stage_record(), encoder)]
    assert found == (f"memory://bucket/{tmp_path.name}/checkpoint" if remote else str(tmp_path / "checkpoint"))
    assert storage.exists(f"{found}/manifest.json")
    assert (worker.work.path / "checkpoint").exists() != remote, "a copy of what is in the bucket takes no room"
