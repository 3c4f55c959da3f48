"""Commands of README and docs: how they are found, and what each one makes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.console import COMMANDS
from tests.paths import ROOT

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)

SHELLS = {"", "bash", "sh", "shell", "console"}
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(
    r"`((?:\.venv/bin/)?python (?:jobs/|-m )[^`\n]+|make [a-z-]+|ray [a-z][^`\n]+|tinygptv [a-z-][^`\n]*)`"
)
_PROGRAMS = r"python3?|tinygptv|make|ray|docker|kubectl|git|curl|pre-commit|\."
_PROGRAM = re.compile(rf"^(?:[A-Z_]+=\S+ )*(?:\S+/)?(?:{_PROGRAMS}) ")

STAGES = tuple(f"stage{number}/checkpoint" for number in range(1, 5))

MAKES = {
    "demo": ("", "result.json", "world", "shards", "backbones", "features", "score", "artifact", "answer.png", *STAGES),
    "stage": ("checkpoint", "config.yaml", "metrics.jsonl", "result.json", "loss.png"),
    "score": ("", "predictions.jsonl", "report.html", "comparison.html", "result.json"),
    "quantize": ("", "result.json"),
    "prepare_data": ("", "quarantine.jsonl", "manifest.json", "result.json"),
    "miniature": (
        "",
        "world",
        "shards",
        "backbones",
        "train.jsonl",
        "test.jsonl",
        "test_known.jsonl",
        "test_boxes.jsonl",
    ),
    "released": ("", "artifact", "result.json"),
}
"""Job (stage1 .. stage4: stage) -> paths below its output that later commands may name; others: everything."""


@dataclass(frozen=True)
class Command:
    """One command of a document.

    Attributes:
        location: ``docs/x.md:12``.
        words: as the shell splits them, without variables before the program.
        text: as it is written, on one line.
    """

    location: str
    words: tuple[str, ...]
    text: str


def commands_of(path: Path) -> Iterator[Command]:
    """The commands of one document, in order."""
    text = path.read_text()
    name = path.relative_to(ROOT)
    found: list[tuple[int, str]] = []
    for fence in _FENCE.finditer(text):
        if fence[1] not in SHELLS:
            continue
        position = fence.start(2)
        for line in re.findall(r"(?:[^\n]*\\\n)*[^\n]*\n?", fence[2]):
            joined = re.sub(r" *\\\n *", " ", line).strip().removeprefix("$ ")
            if _PROGRAM.match(f"{joined} "):
                found.append((position, joined))
            position += len(line)
    prose = _FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    found += [(match.start(), match[1]) for match in _INLINE.finditer(prose)]
    for position, line in sorted(found):
        words = shlex.split(line, comments=True)
        while "=" in words[0]:
            words.pop(0)
        yield Command(f"{name}:{text[:position].count(chr(10)) + 1}", tuple(words), line)


def plain_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """The call of Python that a ``ray job submit`` or the command ``tinygptv`` makes, or the words themselves."""
    if words[:3] == ("ray", "job", "submit") and "--" in words:
        words = words[words.index("--") + 1 :]
    if words[0] == "tinygptv" and not words[1].startswith("-"):
        kind, _, module = COMMANDS[words[1]].target.partition(":")
        target = ("-m", module.removesuffix(".__main__")) if kind == "module" else (f"jobs/{kind}.py",)
        return ("python", *target, *words[2:])
    return words
