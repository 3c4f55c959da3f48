"""Parts of the driver's side of a stage: files that are collected, errors of workers, GPUs, the closing lines."""

from __future__ import annotations

import contextlib
import re
import threading

import pytest
import torch

from pipelines import storage
from pipelines.settings import SettingsError
from pipelines.training import run as module
from pipelines.training.record import WORKER_FILES
from pipelines.training.result import WorkerResult, print_result
from tests.unit.training.test_driver import job_of


def test_what_the_workers_wrote_is_collected_from_their_storage(tmp_path):
    shared = f"memory://bucket/{tmp_path.name}"
    storage.write_atomically(f"{shared}/metrics.jsonl", b"one")
    storage.write_atomically(f"{shared}/notes.txt", b"mine")
    work = storage.WorkFolder(str(tmp_path))
    published = []
    work.publish = lambda *names: published.append(names)
    module._collect(job_of(tmp_path, storage_path=shared), work)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"one" and not (tmp_path / "notes.txt").exists()
    assert published == [WORKER_FILES] and not (tmp_path / "unsent.jsonl").exists()
    fetched = []
    work.fetch = lambda *names: fetched.append(names)
    module._collect(job_of(tmp_path), work)
    assert fetched == [WORKER_FILES] and len(published) == 1


@pytest.mark.parametrize("shared", ["memory://bucket/{}", "{}/elsewhere"])
def test_what_workers_could_not_send_moves_behind_what_the_driver_could_not(tmp_path, shared):
    """The driver sends it from here on; a later run of more steps finds nothing to send twice."""
    shared = shared.format(tmp_path if "elsewhere" in shared else tmp_path.name)
    storage.make_folder(shared)
    storage.write_atomically(f"{shared}/unsent.jsonl", b"worker\n")
    work = storage.WorkFolder(f"memory://driver/{tmp_path.name}")
    (work.path / "unsent.jsonl").write_bytes(b"driver\n")
    job = job_of(tmp_path, storage_path=shared)
    module._collect(job, work)
    assert storage.read_bytes(f"memory://driver/{tmp_path.name}/unsent.jsonl") == b"driver\nworker\n"
    assert not storage.exists(f"{shared}/unsent.jsonl")
    module._collect(job, work)
    assert (work.path / "unsent.jsonl").read_bytes() == b"driver\nworker\n"


def test_a_call_in_a_thread_is_waited_for_and_its_error_raised_here():
    seen = []
    module.call_in_thread(lambda: seen.append(threading.current_thread()))
    assert seen[0] is not threading.current_thread() and seen[0].daemon and not seen[0].is_alive()

    for error in (KeyError("why"), SystemExit(3), KeyboardInterrupt()):  # a thread would end silently at the last two

        def fail(error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            module.call_in_thread(fail)
        assert caught.value is error


def test_a_gpu_that_is_not_there_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "train_loop", lambda job: pytest.fail("it would train"))
    told = (
        f"use_gpu=true: torch {torch.__version__} finds no CUDA GPU here. Give use_gpu=false, or num_workers=1 and "
        "the cluster that has GPUs as ray_address=HOST:PORT."
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(told)}$"):
        module._run_inline(job_of(tmp_path, use_gpu=True))


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_settings_are_for_gpus_and_leave_ones_own(tmp_path, monkeypatch, gpu):
    environment = {"OTHER": "1"}
    monkeypatch.setattr(module.os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    job = job_of(tmp_path, use_gpu=gpu, loader_workers=0)
    monkeypatch.setattr(module, "train_loop", lambda given: given is job and "result")
    assert module._run_inline(job) == "result"
    assert environment == {"OTHER": "1", **(module.GPU_ENVIRONMENT if gpu else {})}
    environment["PYTORCH_ALLOC_CONF"] = "mine"
    module._run_inline(job)
    assert environment["PYTORCH_ALLOC_CONF"] == "mine"


@pytest.mark.parametrize(("loaders", "order"), [(1, ["open", "train", "closed"]), (0, ["train"])])
def test_loader_processes_have_a_cluster_of_ours(tmp_path, monkeypatch, loaders, order):
    """Ray Data would start one of its own: without a token, and for everybody on the network."""
    done = []

    @contextlib.contextmanager
    def cluster(settings):
        assert settings.loader_workers == loaders
        done.append("open")
        yield
        done.append("closed")

    monkeypatch.setattr(module, "start_ray", cluster)
    monkeypatch.setattr(module, "train_loop", lambda job: done.append("train") or "result")
    assert module._run_inline(job_of(tmp_path, num_workers=0, loader_workers=loaders)) == "result"
    assert done == order


@pytest.mark.parametrize(
    ("steps", "states", "refused"),
    [(13, 0, 13), (0, 13, 13), (12, 12, 0), (14, 13, 14), (12, 14, 14), (13, 14, 14), (0, 0, 0)],
)
def test_a_run_of_more_steps_is_refused_with_their_number(tmp_path, monkeypatch, steps, states, refused):
    results = {tmp_path: {"steps": steps} if steps else None}
    monkeypatch.setattr(module, "read_result", lambda output: results[output])
    monkeypatch.setattr(
        module.StateStore, "newest_step", lambda self: states if self.location == f"{tmp_path}/states" else 1 / 0
    )
    if not refused:
        return module._refuse_shorter_run(job_of(tmp_path), tmp_path)
    told = (
        rf"{tmp_path} holds a run of {refused} steps, and 12 are asked for \(max_steps, stage.schedule\): give another"
    )
    with pytest.raises(SettingsError, match=f"^{told} output=, or overwrite=true to begin again.$"):
        module._refuse_shorter_run(job_of(tmp_path), tmp_path)


def test_the_last_lines_of_a_job(capsys):
    result = WorkerResult("/checkpoint", 3.14159, 2.0, 12).to_stage_result("/out/result.json", 61.6)
    print_result(result)
    plain = "loss 3.142 -> 2.000 in 12 steps, 62 s\n", "checkpoint: /checkpoint\n/out/result.json\n"
    assert capsys.readouterr().out == "".join(plain)
    held = {"first": 3.0, "last": 2.5, "best": 2.25, "best_step": 8, "checkpoint_step": 4}
    print_result({**result, "held_out": held})
    line = "held-out loss 3.000 -> 2.500, least 2.250 after step 8; the checkpoint is of step 4\n"
    assert capsys.readouterr().out == plain[0] + line + plain[1]
