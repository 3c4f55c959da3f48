"""Mutation testing of the pure modules: each small change to the code must turn a test red (``make mutants``).

    python -m tests.mutants                  all pieces, one after the other
    python -m tests.mutants mixture gate     some of them
    python -m tests.mutants --list           their names, files and tests

Each piece is a copy of the project below ``outputs/mutants`` in which mutmut changes one module and runs that module's
own tests. ``outputs/mutants/NAME.md`` has the numbers and the changes that no test noticed;
docs/testing.md has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

OUTPUT = ROOT / "outputs/mutants"


@dataclass(frozen=True)
class Piece:
    """A module and the tests that hold it.

    Attributes:
        module: path of the file that is changed.
        tests: files or folders below ``tests/unit``.
    """

    module: str
    tests: tuple[str, ...]


PIECES = {
    "mixture": Piece("tinygptv/data/mixture.py", ("data/test_mixture.py",)),
    "sample": Piece("tinygptv/data/sample.py", ("data/test_sample.py",)),
    "collate": Piece("tinygptv/data/collate.py", ("data/test_sample.py", "data/test_collate.py")),
    "boxes": Piece("tinygptv/data/boxes.py", ("data/test_boxes.py",)),
    "schedule": Piece("tinygptv/training/schedule.py", ("training/test_schedule.py", "training/test_bounds.py")),
    "train_step": Piece("tinygptv/training/train_step.py", ("training/test_update.py", "training/test_train_step.py")),
    "metrics": Piece("tinygptv/metrics/metrics.py", ("metrics/test_metrics.py",)),
    "intervals": Piece("tinygptv/metrics/intervals.py", ("metrics/test_intervals.py",)),
    "vqa_text": Piece("tinygptv/metrics/vqa_text.py", ("metrics/test_metrics.py",)),
    "checkpoint": Piece("tinygptv/checkpoint/checkpoint.py", ("checkpoint", "training/test_states.py")),
    "folders": Piece("tinygptv/checkpoint/folders.py", ("checkpoint/test_folders.py",)),
    "states": Piece("pipelines/training/states.py", ("training/test_states.py",)),
    "record": Piece("pipelines/training/record.py", ("training/test_record.py",)),
    "settings": Piece("pipelines/settings/base.py", ("settings/test_settings.py",)),
    "protocol": Piece("pipelines/serving/protocol.py", ("serving/test_protocol.py",)),
    "gate": Piece("pipelines/serving/gate.py", ("serving/test_gate.py",)),
    "media": Piece("pipelines/serving/media.py", ("serving/test_media.py",)),
    "data_url": Piece("pipelines/serving/data_url.py", ("serving/test_data_url.py",)),
    "fetch": Piece("pipelines/serving/fetch.py", ("serving/test_fetch.py",)),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a piece's mutants.

    Attributes:
        mutants: changes that were tried.
        killed: a test failed, or ran into its time limit.
        survivors: names of those that no test noticed.
        seconds: the whole run.
    """

    mutants: int
    killed: int
    survivors: list[str]
    seconds: float

    @property
    def share(self) -> float:
        """Killed ones, 0..1."""
        return self.killed / self.mutants if self.mutants else 1.0


def copy_project(folder: Path, piece: Piece) -> None:
    """A copy of all tracked and new files, with mutmut's settings for one piece."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    shutil.rmtree(folder, ignore_errors=True)
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    options = {
        "source_paths": ["tinygptv", "pipelines"],
        "only_mutate": [piece.module],
        "also_copy": ["configs", "docs", "jobs", "benchmarks", "deploy"],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-x"],
        "pytest_add_cli_args_test_selection": [f"tests/unit/{name}" for name in piece.tests if _is_there(name)],
        "process_isolation": "forkserver",  # a process with torch's threads must not be forked
        "use_git_change_detection": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n[tool.mutmut]\n" + "\n".join(lines) + "\n")


def _is_there(name: str) -> bool:
    return (ROOT / "tests/unit" / name).exists()


def mutmut(folder: Path, *words: str) -> str:
    """Run mutmut in a copy; returns its output without the spinner."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *words],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        log = folder.with_suffix(".log")
        log.write_text(done.stdout + done.stderr)
        raise SystemExit(f"mutmut {' '.join(words)} failed: {log}")
    return done.stdout


def run_piece(name: str, children: int) -> Outcome:
    """Try every mutant of a piece and write ``NAME.md``."""
    piece, folder = PIECES[name], OUTPUT / name
    started = time.perf_counter()
    copy_project(folder, piece)
    mutmut(folder, "run", "--max-children", str(children))
    codes = json.loads((folder / "mutants" / f"{piece.module}.meta").read_text())["exit_code_by_key"]
    survivors = [key for key, code in codes.items() if code in (0, 5, 33, None)]  # 5, 33: no test reaches it
    outcome = Outcome(len(codes), len(codes) - len(survivors), survivors, time.perf_counter() - started)
    lines = [f"# {piece.module}", "", f"{outcome.killed} of {outcome.mutants} mutants killed ({outcome.share:.1%})", ""]
    for key in survivors:
        shown = mutmut(folder, "show", key).splitlines()
        changed = [line for line in shown if line[:1] in "+-" and not line.startswith(("---", "+++"))]
        lines += [f"* `{key}`", "", "  ```diff", *(f"  {line}" for line in changed), "  ```", ""]
    (OUTPUT / f"{name}.md").write_text("\n".join(lines) + "\n")
    return outcome


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="NAME", help="pieces to run [all]")
    parser.add_argument("--list", action="store_true", help="list the pieces")
    parser.add_argument("--children", type=int, default=2, help="mutants that are tried at a time [2]")
    arguments = parser.parse_args()
    if unknown := set(arguments.pieces) - set(PIECES):
        parser.error(f"no such piece: {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    if arguments.list:
        for name, piece in PIECES.items():
            print(f"{name:12} {piece.module:36} {' '.join(piece.tests)}")
        return
    OUTPUT.mkdir(parents=True, exist_ok=True)
    print("| module | mutants | killed | share | time |\n|---|---|---|---|---|", flush=True)
    for name in arguments.pieces or PIECES:
        outcome = run_piece(name, arguments.children)
        row = (
            f"`{PIECES[name].module}`",
            outcome.mutants,
            outcome.killed,
            f"{outcome.share:.0%}",
            f"{outcome.seconds:.0f} s",
        )
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
