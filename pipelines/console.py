"""The command ``tinygptv``: ``tinygptv serve artifact=DIR`` is ``python jobs/serve_http.py artifact=DIR``, and so on.

Each command is a job's script or a module of the model library; only what is asked for is imported. A missing library
is told with the extra that brings it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinygptv import __version__


@dataclass(frozen=True)
class Command:
    """One word after ``tinygptv``.

    Attributes:
        target: ``module:NAME`` with a ``main(argv)``, or the name of a script in ``jobs/``.
        extra: of the package, which brings its libraries; empty for the model library's own.
        text: what it does.
    """

    target: str
    extra: str
    text: str


COMMANDS: dict[str, Command] = {
    "chat": Command("module:tinygptv.chat", "", "ask a model about an image"),
    "convert": Command("module:tinygptv.convert.__main__", "", "weights of other layouts -> checkpoint, and back"),
    "hub": Command("module:tinygptv.hub", "", "checkpoint folders on the Hugging Face hub: pull, push"),
    "released": Command("released", "serve", "fetch, convert, quantize and serve the released model"),
    "fetch": Command("fetch", "serve", "published weights and data sets by name"),
    "serve": Command("serve_http", "serve", "serve a model over HTTP, with a web page"),
    "batch": Command("batch", "serve", "answer a file of requests"),
    "quantize": Command("quantize", "serve", "checkpoint -> artifact with low-bit weights"),
    "prepare": Command("prepare_data", "train", "data sets -> Arrow shards"),
    "features": Command("cache_features", "train", "query features of the frozen encoder, computed once"),
    "stage1": Command("stage1", "train", "train stage 1: warm-up"),
    "stage2": Command("stage2", "train", "train stage 2: pre-training"),
    "stage3": Command("stage3", "train", "train stage 3: human-like learning"),
    "stage4": Command("stage4", "train", "train stage 4: multi-task learning"),
    "recipe": Command("recipe", "train", "a whole recipe in one command"),
    "score": Command("score", "train", "a checkpoint or artifact on benchmarks"),
    "ablate": Command("ablate", "train", "the ablation matrix"),
    "plan-memory": Command("plan_memory", "train", "will it fit?"),
    "miniature": Command("miniature", "train", "draw the miniature world, or pretrain its backbones"),
    "demo": Command("demo", "train", "the whole pipeline on the miniature"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        print(f"error: {words[0]!r} is no command; there are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    sys.argv[0] = f"tinygptv {words[0]}"
    try:
        return run(command, words[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("tinygptv", "pipelines"):
            raise
        extra = f"[{command.extra}]" if command.extra else ""
        print(f"error: {error.name} is not installed: pip install 'tinygptv{extra}'.", file=sys.stderr)
        return 2


def run(command: Command, argv: Sequence[str]) -> int:
    """Call a command's ``main``."""
    kind, _, name = command.target.partition(":")
    if kind == "module":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the module does where it is run by itself
        return int(importlib.import_module(name).main(argv, prog=sys.argv[0]))
    path = jobs_folder() / f"{command.target}.py"
    spec = importlib.util.spec_from_file_location(f"tinygptv_job_{command.target}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.main(argv))


def jobs_folder() -> Path:
    """The entry scripts: of the source tree, or those that an installed package brings."""
    here = Path(__file__).resolve().parent
    tree = here.parent / "jobs"
    return tree if (tree / "fetch.py").is_file() else here / "jobs"


def usage() -> str:
    """What ``tinygptv --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.text}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: tinygptv COMMAND [--config FILE] [key=value ...]", "", *lines, "", "COMMAND --help: its keys"]
    )
