"""The files around the code agree with it: versions, hooks, workflow, typing markers, words."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
import tomllib

import pytest
import yaml

import tinygptv
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lint_commands() -> list[str]:
    """Tools that ``make lint`` runs."""
    target = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [line.split("$(BIN)/")[1].strip() for line in target[1].splitlines()]


def test_one_version():
    release, date = re.search(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert tinygptv.__version__ == release == str(citation["version"])
    assert str(citation["date-released"]) == date
    assert "2312.16862" in citation["preferred-citation"]["url"]


def test_the_hooks_run_what_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"].split() for repository in config["repos"] for hook in repository["hooks"]]
    files = (".", "$$files")  # pre-commit names those of a commit
    tools = [[word for word in command.split() if word not in (*files, "--check")] for command in lint_commands()]
    assert [
        [entry[0].removeprefix(".venv/bin/"), *entry[1:]][: len(tool)] for entry, tool in zip(hooks, tools, strict=True)
    ] == tools


def test_the_workflow_runs_what_must_be_green():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python-version"]
    assert f">={versions[0]}" == PROJECT["project"]["requires-python"]
    assert [step["run"] for step in jobs["test"]["steps"] if "run" in step] == ["make setup", ".ci/run"]
    assert [step["run"] for step in jobs["docs"]["steps"] if "run" in step] == ["make docs"]
    assert any("pip-audit" in step.get("run", "") for step in jobs["audit"]["steps"])


@pytest.mark.parametrize("package", ["tinygptv", "pipelines"])
def test_packages_tell_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").exists()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


def test_every_document_is_in_the_site():
    pages = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages |= set(re.findall(r"- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    documents = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert documents <= pages, f"name these in the nav of mkdocs.yml: {sorted(documents - pages)}"


# ------------------------------------------------------------------ words


def word_list() -> dict[str, str]:
    """Word -> its replacement, from the table in CONTRIBUTING.md; entries that need judgement are not searched."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| yes \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {word.strip(): instead.strip() for words, instead in rows for word in words.split(",")}


def prose() -> dict[str, str]:
    """``path:line`` -> docstring, comment or line of a document."""
    names = subprocess.check_output(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, text=True).split()
    found: dict[str, str] = {}
    for name in names:
        if name.startswith(("tests/", "docs/gallery", "CONTRIBUTING")) or not (ROOT / name).exists():
            continue
        text = (ROOT / name).read_text()
        if name.endswith(".md"):
            found |= {f"{name}:{number}": line for number, line in enumerate(text.splitlines(), 1)}
            continue
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            is_docstring = token.type == tokenize.STRING and token.line.lstrip().startswith(('"""', 'r"""'))
            if is_docstring or token.type == tokenize.COMMENT:
                found[f"{name}:{token.start[0]}"] = token.string.strip('r"')
    return found


def test_words_are_those_of_the_list():
    words = word_list()
    assert {"anew", "pictures"} <= set(words)
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
    texts = prose()
    assert len(texts) > 3000
    assert any(text.startswith("TinyGPT-V as a model library") for text in texts.values()), "docstrings are searched"
    wrong = [
        f"{where}: {match[0]!r} -> {words[match[0].lower()]}"
        for where, text in texts.items()
        for match in pattern.finditer(re.sub(r"`[^`]*`|\"[^\"]*\"", "", text))
    ]
    assert not wrong, "\n".join(wrong)
