"""The end of a job: its exit status, one sentence for a user's mistake, a trace for ours."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from types import SimpleNamespace

import pytest

from pipelines import cli
from pipelines.settings import SettingsError
from pipelines.storage import DiskFullError, StorageError

quiet_libraries, quieted = cli.quiet_libraries, []


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """A job's process is its own: what it sets there must not reach other tests."""
    monkeypatch.setattr(cli, "quiet_libraries", lambda: quieted.append(True))
    monkeypatch.delenv("TINYGPTV_TRACE", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [SettingsError("no"), DiskFullError("no"), StorageError("no"), FileNotFoundError("no"), PermissionError("no")],
)
def test_a_users_mistake_is_one_sentence(capsys, error):
    assert cli.run_main(raising(error)) == 2
    assert capsys.readouterr().err == "error: no\n"


def test_a_mistake_is_told_without_the_password_of_its_uri(capsys):
    assert cli.run_main(raising(ValueError("MLflow at http://me:secret@host:5000 has no models:/x"))) == 2
    assert capsys.readouterr().err == "error: MLflow at http://***@host:5000 has no models:/x\n"


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG])
def test_a_disk_that_cannot_be_written_is_one_sentence(capsys, number):
    assert cli.run_main(raising(OSError(number, os.strerror(number), "/data/part.npy"))) == 2
    assert capsys.readouterr().err == f"error: [Errno {number}] {os.strerror(number)}: '/data/part.npy'\n"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("bug"), OSError(5, "I/O"), ConnectionError("bug")])
def test_other_errors_show_their_trace(error):
    with pytest.raises(type(error)):
        cli.run_main(raising(error))


def test_a_trace_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("TINYGPTV_TRACE", "1")
    with pytest.raises(SettingsError):
        cli.run_main(raising(SettingsError("no")))


def test_a_job_that_is_stopped_says_how_to_resume(capsys):
    assert cli.run_main(lambda: None) == 0 and capsys.readouterr().err == ""
    assert cli.run_main(raising(KeyboardInterrupt())) == 130
    assert cli.run_main(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "Interrupted. Run the same command to resume.\n" * 2


def test_signals_belong_to_the_main_thread():
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(cli.run_main(lambda: None)))
    thread.start(), thread.join()
    assert found == [0] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["job", "checkpoint=hf://org/name"], True),
        (["job", "--config", "{file}"], True),
        (["job", "--config={file}"], True),
        (["job", "--config", "{other}", "data=x"], False),
        (["job", "--config", "/nowhere.yaml"], False),
        (["job", "--config", "/nowhere.yaml", "checkpoint=hf://org/name"], True),
        (["job", "{file}"], False),
        (["job", "--config", "{other}", "--config", "{file}"], True),
        (["job"], False),
    ],
)
def test_the_hub_is_asked_only_where_a_word_or_the_file_names_it(tmp_path, words, names):
    (tmp_path / "a.yaml").write_text("serve: {artifact: hf://org/name}")
    (tmp_path / "b.yaml").write_bytes(b"serve: {artifact: x} # \xff")  # another encoding is the job's business
    paths = {"file": tmp_path / "a.yaml", "other": tmp_path / "b.yaml"}
    assert cli._names_the_hub([word.format(**paths) for word in words]) is names


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_stage_is_trained_or_only_shown(monkeypatch, capsys, dry_run):
    from pipelines.training import run

    done = []
    monkeypatch.setattr(run, "run_stage", lambda settings, number: done.append(number) or {"n": number})
    monkeypatch.setattr(run, "dry_run", lambda settings, number: f"plan of {number}")
    monkeypatch.setattr("pipelines.training.result.print_result", lambda result: print(f"result {result['n']}"))
    assert cli.run_stage_main(3, [f"dry_run={str(dry_run).lower()}"], "x") == 0
    assert capsys.readouterr().out == ("plan of 3\n" if dry_run else "result 3\n") and done == ([] if dry_run else [3])
    assert logging.getLogger("pipelines") is not None


QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}


@pytest.mark.parametrize(("words", "offline"), [(["job"], "1"), (["job", "checkpoint=hf://org/name"], None)])
def test_a_job_quiets_libraries_unless_the_environment_says_otherwise(monkeypatch, words, offline):
    for name in (*QUIET, "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "before")  # so that it is restored
        monkeypatch.delenv(name)
    warn = ("httpx", "httpx2", "alembic", "bitsandbytes", "matplotlib")
    levels = {
        name: logging.getLogger(name).level for name in (*warn, "urllib3.connectionpool", "mlflow.store.db.utils")
    }
    configured = []
    monkeypatch.setattr(cli.logging, "basicConfig", lambda **options: configured.append(options))
    monkeypatch.setattr(cli.sys, "argv", words)
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "DEBUG")
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.NOTSET)
        quiet_libraries()
        assert {name: os.environ.get(name) for name in QUIET} == {**QUIET, "MLFLOW_LOGGING_LEVEL": "DEBUG"}
        assert os.environ.get("HF_HUB_OFFLINE") == offline
        found = [logging.getLogger(name).level for name in levels]
        assert found == [logging.WARNING] * 5 + [logging.ERROR, logging.CRITICAL]
        assert configured == [{"level": logging.INFO, "format": "%(levelname)s %(name)s: %(message)s"}]
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_what_the_environment_says_stays(monkeypatch):
    names = (*QUIET, "HF_HUB_OFFLINE")
    for name in names:
        monkeypatch.setenv(name, "mine")
    quiet = SimpleNamespace(setLevel=lambda level: None)
    fake = SimpleNamespace(
        basicConfig=lambda **_: None, getLogger=lambda name: quiet, INFO=20, WARNING=30, ERROR=40, CRITICAL=50
    )
    monkeypatch.setattr(cli, "logging", fake)
    monkeypatch.setattr(cli.sys, "argv", ["job"])
    quiet_libraries()
    assert {os.environ[name] for name in names} == {"mine"}


def test_libraries_are_quieted_before_the_work():
    quieted.clear()
    seen = []
    assert cli.run_main(lambda: seen.extend(quieted)) == 0
    assert seen == [True]


def test_a_stage_gets_its_settings_and_its_help_says_what_it_does(monkeypatch, capsys):
    from pipelines.training import run

    done = []
    monkeypatch.setattr(run, "run_stage", lambda settings, number: done.append((settings.data, number)))
    monkeypatch.setattr("pipelines.training.result.print_result", done.append)
    assert cli.run_stage_main(2, ["data=x"], "what it does") == 0 and done == [("x", 2), None]
    with pytest.raises(SystemExit):
        cli.run_stage_main(2, ["--help"], "what it does")
    assert "what it does" in capsys.readouterr().out


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), cli.Terminated()])
def test_a_command_ends_in_its_own_way_before_the_job_that_runs_it(monkeypatch, interrupt):
    """It was killed a quarter of a second later, and could close nothing."""
    told = []

    class Process:
        def __init__(self, words):
            told.append(words)

        def wait(self):
            told.append("wait")
            if told.count("wait") == 1:
                raise interrupt
            return 143

        def terminate(self):
            told.append("terminate")

    monkeypatch.setattr(cli.subprocess, "Popen", Process)
    with pytest.raises(type(interrupt)):
        cli.run_command(["job", "key=value"])
    asked = ["terminate"] if isinstance(interrupt, cli.Terminated) else []  # Ctrl-C reaches both
    assert told == [["job", "key=value"], "wait", *asked, "wait"]


def test_a_command_gives_its_exit_status(monkeypatch):
    monkeypatch.setattr(cli.subprocess, "Popen", lambda words: SimpleNamespace(wait=lambda: len(words)))
    assert cli.run_command(["a", "b"]) == 2
