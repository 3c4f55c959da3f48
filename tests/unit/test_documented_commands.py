"""Commands in README and docs run as written: program, options, keys, values, files that commands before them make."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import pipelines.settings
from pipelines.settings import ServeSettings, SettingsError, TrainSettings
from pipelines.settings.command_line import parse_words
from tests.documented_commands import DOCUMENTS, MAKES, Command, commands_of, plain_words
from tests.paths import ROOT

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
INPUT_KEYS = {"checkpoint", "init_from", "artifact", "compare_with", "backbones", "stages"}
INPUT_OPTIONS = {"--vision", "--qformer", "--language", "--projection", "--checkpoint", "--model"}
MADE = ("outputs/", "checkpoints/", "weights/")
"""Folders that commands make: what is named below them must come from a command before."""


@cache
def settings_of(job: str) -> type[pipelines.settings.Settings]:
    source = (ROOT / f"jobs/{job}.py").read_text()
    if "run_stage_main" in source:
        return TrainSettings
    return getattr(pipelines.settings, re.search(r"(\w+Settings)\.from_command_line", source)[1])


def is_open(word: str) -> bool:
    """Whether a word stands for something of the reader's own: ``...``, ``DIR``, ``data=DATA/x``."""
    return "..." in word or re.search(r"(?:^|[=/])[A-Z][A-Z_]+(?:/|$)", word) is not None


def check_job(words: tuple[str, ...]) -> dict[str, str]:
    """Read a job's words as the job does; returns those with a value."""
    job = Path(words[0]).stem
    if words[1:] == ("--help",):
        return {}
    known = settings_of(job)
    parsed = parse_words(known.model_fields, [word for word in words[1:] if word != "..."])
    config = None if parsed.config is None or is_open(parsed.config) else ROOT / parsed.config
    known.load(config, [word for word in parsed.overrides if not is_open(word)])
    for word in parsed.overrides:
        assert word.partition("=")[0].partition(".")[0] in known.model_fields, word
    return dict(word.split("=", 1) for word in parsed.overrides if "=" in word)


def check_module(words: tuple[str, ...]) -> dict[str, str]:
    """Parse the words of ``python -m tinygptv.x`` with its own parser."""
    module, *arguments = words
    if module == "tinygptv.convert":
        from tinygptv.convert.__main__ import _parser

        if arguments and arguments != ["--help"]:
            _parser(module).parse_args(
                [word for word in arguments if word != "..."] + (["--output", "x"] if "..." in arguments else [])
            )
    elif module == "tinygptv.chat":
        from tinygptv.chat import _parse

        _parse(arguments, module)
    else:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists() or (
            ROOT / module.replace(".", "/") / "__main__.py"
        ).exists()
    values = {}
    for option, value in pairwise(arguments):
        if option.startswith("--"):
            values[option] = value
    return values


def outputs_of(words: tuple[str, ...], values: dict[str, str]) -> set[str]:
    """Paths that a command makes, as prefixes or whole paths."""
    if words[:2] == ("python", "-m"):
        return {values["--output"]} if "--output" in values else set()
    job = re.sub(r"\d$", "", Path(words[1]).stem)
    output = values.get("output", f"outputs/{job}")
    if job == "fetch":
        from pipelines.fetch.datasets import find_sets
        from tinygptv.convert.sources import find_parts

        what = [name.strip() for name in values.get("what", "").strip("[]").split(",")]
        names = [name for name in what if name != "sample" and not find_sets(name)]
        return {f"{output}/{part.path}" for name in names for part in find_parts(name)}
    return {f"{output}/{part}".rstrip("/") for part in MAKES.get(job, ("",))}


def inputs_of(values: dict[str, str]) -> list[str]:
    found = [value for key, value in values.items() if key in INPUT_KEYS | INPUT_OPTIONS]
    found += [value for key, value in values.items() if key == "data" and value.startswith("outputs/")]
    return [value.rstrip("/") for value in found if value.startswith(MADE) and not is_open(value)]


def check(command: Command, made: set[str]) -> None:
    words = plain_words(command.words)
    program = words[0]
    assert program not in (".venv/bin/python", "python3"), "docs call `python` (activate .venv once)"
    if program == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS, "no such target"
        if "demo" in words:
            made |= {f"outputs/demo/{part}" for part in MAKES["demo"]}
    elif program == "python" and words[1] == "-m" and words[2].startswith("tinygptv"):
        values = check_module(words[2:])
        for path in [] if "..." in words else inputs_of(values):
            assert path in made, f"{path} is made by no command before"
        made |= outputs_of(words, values)
    elif program == "python" and words[1].startswith("jobs/"):
        values = check_job(words[1:])
        for path in inputs_of(values):
            assert path in made, f"{path} is made by no command before"
        made |= outputs_of(words, values)
    elif program == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists()
    elif program == "ray":
        from ray.scripts.scripts import cli

        assert words[1] in cli.commands, "no such ray command"
    elif program in ("docker", "kubectl"):
        for option, path in pairwise(words):
            if option == "-f" and path != "-":
                assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_run_as_written(document):
    """A page may use outputs of the demo, of its own earlier commands, and of pages that it builds on."""
    made = {f"outputs/demo/{part}".rstrip("/") for part in MAKES["demo"]}
    for earlier in re.findall(r"^Builds on \[[^]]+\]\(([^)]+)\)", document.read_text(), re.MULTILINE):
        for command in commands_of(document.parent / earlier):
            check(command, made)
    wrong = []
    for command in commands_of(document):
        try:
            check(command, made)
        except (AssertionError, SettingsError, SystemExit, KeyError, ValueError) as error:
            wrong.append(f"{command.location}: {command.text}\n    {error}")
    assert not wrong, "\n".join(wrong)


def test_commands_are_found():
    found = [command for document in DOCUMENTS for command in commands_of(document)]
    assert len(found) > 100
    assert sum(command.text.startswith("python jobs/") for command in found) > 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python jobs/stage1.py --config configs/mini.yaml stag.lora_rank=1", "stag"),
        ("python jobs/score.py checkpoint=outputs/demo/stage5/checkpoint", "made by no command"),
        ("python jobs/score.py limit=many", "limit"),
        ("python jobs/nothing.py", "nothing"),
        ("python -m tinygptv.convert release --vison x --output y", ""),
        ("make dinner", "target"),
        (".venv/bin/python jobs/demo.py", "activate"),
        ("ray upp x", "no such ray"),
        ("tinygptv serve artefact=x", "artefact"),
    ],
)
def test_a_wrong_command_is_found(text, message):
    made = {f"outputs/demo/{part}" for part in MAKES["demo"]}
    command = Command("here", tuple(text.split()), text)
    with pytest.raises((AssertionError, SettingsError, SystemExit, FileNotFoundError), match=message or None):
        check(command, made)


def test_requests_name_the_served_model():
    name = ServeSettings().model_name
    for document in DOCUMENTS:
        for found in re.findall(r"(?:\bmodel=|\"model\": |--model )\"([a-z0-9.-]+)\"", document.read_text()):
            assert found == name, f"{document}: {found}"


def test_weight_files_have_their_published_names():
    from tinygptv.convert.sources import all_parts

    published = {file.name for part in all_parts().values() for file in part.files}
    configs = [ROOT / "configs/paper.yaml", ROOT / "configs/released.yaml"]
    commands = [command.text for document in DOCUMENTS for command in commands_of(document)]
    texts = [*commands, *(path.read_text() for path in configs)]
    named = {name for text in texts for name in re.findall(r"[\w.-]+\.pth", text)}
    assert "prerained_minigpt4_7b.pth" in named and "eva_vit_g.pth" in named
    assert {name for name in named if not name.startswith("stage")} <= published


def test_links_to_files_exist():
    wrong = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", document.read_text()):
            path = (document.parent / target).resolve()
            generated = {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
            if not path.exists() and path != ROOT / "docs/tutorials/notebook.md" and path.name not in generated:
                wrong.append(f"{document.relative_to(ROOT)}: {target}")
    assert not wrong, "\n".join(wrong)


CLUSTER_FILES = [ROOT / name for name in ("ray_cluster.yaml", "ray_cluster_local.yaml")]


@pytest.mark.parametrize("document", [*DOCUMENTS, *CLUSTER_FILES], ids=lambda path: str(path.relative_to(ROOT)))
def test_jobs_are_submitted_to_a_cluster_with_the_token(document):
    """Without this variable ``ray job submit`` sends no token, and a cluster with tokens answers 401."""
    before, found, _ = document.read_text().partition("ray job submit --address")
    assert not found or "export RAY_AUTH_MODE=token" in before
