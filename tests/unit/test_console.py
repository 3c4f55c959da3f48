"""The command `tinygptv`: every word leads to a script or module that is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib

import pytest

from pipelines import console
from pipelines.console import COMMANDS, jobs_folder, main
from pipelines.settings import FetchSettings
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_command_is_there():
    for name, command in COMMANDS.items():
        kind, _, target = command.target.partition(":")
        if kind == "module":
            assert importlib.util.find_spec(target), name
        else:
            assert (jobs_folder() / f"{command.target}.py").is_file(), name
        assert command.extra in ("", *PROJECT["optional-dependencies"]), name
    scripts = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert scripts == {command.target for command in COMMANDS.values() if ":" not in command.target}
    assert PROJECT["scripts"] == {"tinygptv": "pipelines.console:main"}


def test_a_job_gets_its_words(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fetch", "--help"])
    out = capsys.readouterr().out
    assert (
        stopped.value.code == 0
        and "usage: tinygptv fetch" in out
        and all(key in out for key in FetchSettings.model_fields)
    )
    assert main(["fetch", "what=nothing", "output=/tmp/none"]) == 2


def test_help_version_and_mistakes(capsys):
    assert main(["--help"]) == 0
    assert "serve " in capsys.readouterr().out
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert main(["sevre"]) == 2
    assert "'sevre' is no command; there are: chat, convert" in capsys.readouterr().err


def test_a_missing_library_names_the_extra(monkeypatch, capsys):
    def missing(command, argv):
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(console, "run", missing)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == "error: ray is not installed: pip install 'tinygptv[serve]'.\n"


def test_the_command_itself_loads_nothing_heavy():
    code = (
        "import sys, pipelines.console as c; c.main(['--help']); print('torch' in sys.modules or 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_missing_module_of_our_own_is_no_missing_library(monkeypatch):
    for name in ("pipelines.nothing", "tinygptv.nothing"):

        def missing(command, argv, name=name):
            raise ModuleNotFoundError(name, name=name)

        monkeypatch.setattr(console, "run", missing)
        with pytest.raises(ModuleNotFoundError):
            main(["serve"])


def test_a_library_of_the_models_own_needs_no_extra(monkeypatch, capsys):
    def missing(command, argv):
        raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")

    monkeypatch.setattr(console, "run", missing)
    assert main(["chat"]) == 2
    assert capsys.readouterr().err == "error: torch.nn is not installed: pip install 'tinygptv'.\n"
