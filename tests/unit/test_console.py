"""The command `tinygptv`: every word leads to a script or module that is there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest

from pipelines import console
from pipelines.console import COMMANDS, jobs_folder, main
from pipelines.settings import FetchSettings
from tests.paths import ROOT
from tinygptv import __version__

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


@pytest.mark.parametrize("name", ["chat", "convert", "hub"])
def test_a_module_calls_itself_what_was_typed(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: tinygptv {name} [-h]")


def test_help_version_and_mistakes(capsys):
    for words, status in ((["--help"], 0), (["-h"], 0), ([], 2)):
        assert main(words) == status
        shown = capsys.readouterr().out.splitlines()
        assert shown[:2] == ["usage: tinygptv COMMAND [--config FILE] [key=value ...]", ""]
        assert shown[2:-2] == [f"  {name:11}  {command.text}" for name, command in COMMANDS.items()]
        assert shown[-2:] == ["", "COMMAND --help: its keys"]
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"
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


def test_a_module_gets_its_words_and_waits_without_spinning(monkeypatch):
    given = []
    module = SimpleNamespace(main=lambda argv, prog: given.append((argv, os.environ["OMP_WAIT_POLICY"])) or True)
    monkeypatch.setattr(console.importlib, "import_module", lambda name: given.append(name) or module)
    monkeypatch.setenv("OMP_WAIT_POLICY", "x")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(console.sys, "argv", ["tinygptv", "chat", "a.jpg", "b"])
    assert main() == 1 and console.sys.argv[0] == "tinygptv chat"
    assert given == ["tinygptv.chat", (["a.jpg", "b"], "PASSIVE")]


def test_how_threads_wait_is_the_environments_matter_first(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(console.sys, "argv", ["tinygptv"])
    monkeypatch.setattr(console.importlib, "import_module", lambda name: SimpleNamespace(main=lambda argv, prog: 0))
    assert main(["chat"]) == 0 and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_jobs_are_those_of_the_tree_or_of_an_installed_package(tmp_path, monkeypatch):
    assert jobs_folder() == ROOT / "jobs"
    (tmp_path / "pipelines").mkdir()
    monkeypatch.setattr(console, "__file__", str(tmp_path / "pipelines/console.py"))
    assert jobs_folder() == tmp_path / "pipelines/jobs"
    (tmp_path / "jobs").mkdir()
    assert jobs_folder() == tmp_path / "pipelines/jobs", "a folder of somebody else's"
    (tmp_path / "jobs/fetch.py").touch()
    assert jobs_folder() == tmp_path / "jobs"


def test_which_script_or_module_a_word_means():
    assert {name: (command.target, command.extra) for name, command in COMMANDS.items()} == {
        "chat": ("module:tinygptv.chat", ""),
        "convert": ("module:tinygptv.convert.__main__", ""),
        "hub": ("module:tinygptv.hub", ""),
        "released": ("released", "serve"),
        "fetch": ("fetch", "serve"),
        "serve": ("serve_http", "serve"),
        "batch": ("batch", "serve"),
        "quantize": ("quantize", "serve"),
        "prepare": ("prepare_data", "train"),
        "features": ("cache_features", "train"),
        **{f"stage{number}": (f"stage{number}", "train") for number in (1, 2, 3, 4)},
        "recipe": ("recipe", "train"),
        "score": ("score", "train"),
        "ablate": ("ablate", "train"),
        "plan-memory": ("plan_memory", "train"),
        "miniature": ("miniature", "train"),
        "demo": ("demo", "train"),
    }


def test_a_script_gets_the_words_after_it_and_gives_its_status(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["tinygptv"])
    monkeypatch.setattr(console, "jobs_folder", lambda: tmp_path)
    (tmp_path / "serve_http.py").write_text("import sys\ndef main(argv): print(sys.argv[0], argv); return 3")
    assert main(["serve", "port=1"]) == 3 and capsys.readouterr().out == "tinygptv serve ['port=1']\n"
