"""Mutation testing of the pure modules: each small change to the code must turn a test red (``make mutants``).

    python -m tests.mutants                  all pieces, one after the other
    python -m tests.mutants mixture gate     some of them
    python -m tests.mutants gate --again     only what no test noticed last time, after tests were added
    python -m tests.mutants --list           their names, files and tests

Each piece is a copy of the project below ``outputs/mutants`` in which mutmut changes one module and runs that module's
own tests. ``outputs/mutants/NAME.md`` has the numbers and the changes that no test noticed;
docs/testing.md has the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.mutant_pieces import PIECES, Piece
from tests.paths import ROOT

OUTPUT = ROOT / "outputs/mutants"

SURVIVED = (0, 5, 33, None)
"""Exit codes of pytest: all tests passed, none ran, or (33, mutmut's own) none reaches the function."""


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


def copy_project(folder: Path, piece: Piece, *, again: bool) -> None:
    """A copy of all tracked and new files, with mutmut's settings for one piece.

    Args:
        folder: of the copy.
        piece: what is tried.
        again: keep the verdicts of the last run; those of survivors are forgotten.
    """
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    module = folder / "mutants" / piece.module
    kept = [path for path in module.parent.glob(f"{module.name}*") if again]
    with tempfile.TemporaryDirectory(dir=OUTPUT) as aside:
        for path in kept:
            shutil.move(path, Path(aside) / path.name)
        shutil.rmtree(folder, ignore_errors=True)
        for path in kept:
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(aside) / path.name, path)
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    if kept:
        forget_survivors(module)
    write_options(folder, piece)


def forget_survivors(module: Path) -> None:
    """Let mutmut try again what no test noticed; what is killed stays so as long as its function does not change."""
    meta = module.with_name(f"{module.name}.meta")
    verdicts = json.loads(meta.read_text())
    codes = verdicts["exit_code_by_key"]
    verdicts["exit_code_by_key"] = {key: None if code in SURVIVED else code for key, code in codes.items()}
    meta.write_text(json.dumps(verdicts))


def write_options(folder: Path, piece: Piece) -> None:
    """mutmut's settings, at the end of the copy's ``pyproject.toml``."""
    options = {
        "source_paths": ["tinygptv", "pipelines"],
        "only_mutate": [piece.module],
        "also_copy": ["configs", "docs", "jobs", "benchmarks", "deploy"],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-p", "tests.mutants_plugin", "-x", "-k", piece.only],
        "pytest_add_cli_args_test_selection": [f"tests/unit/{name}" for name in piece.tests if _is_there(name)],
        "process_isolation": "forkserver",  # a process with torch's threads must not be forked
        "use_git_change_detection": False,
        "timeout_constant": 2.0,
        "timeout_multiplier": 6.0,
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


def run_piece(name: str, children: int, *, again: bool = False) -> Outcome:
    """Try the mutants of a piece and write ``NAME.md``.

    Args:
        name: of the piece.
        children: mutants that are tried at a time.
        again: only those that survived the last run, and those of functions that changed since.
    """
    piece, folder = PIECES[name], OUTPUT / name
    started = time.perf_counter()
    copy_project(folder, piece, again=again)
    mutmut(folder, "run", "--max-children", str(children))
    codes = json.loads((folder / "mutants" / f"{piece.module}.meta").read_text())["exit_code_by_key"]
    survivors = [key for key, code in codes.items() if code in SURVIVED]
    outcome = Outcome(len(codes), len(codes) - len(survivors), survivors, time.perf_counter() - started)
    lines = [f"# {piece.module}", "", f"{outcome.killed} of {outcome.mutants} mutants killed ({outcome.share:.1%})", ""]
    for key in survivors:
        lines += [f"* `{key}`", "", "  ```diff", *(f"  {line}" for line in changed_lines(folder, key)), "  ```", ""]
    (OUTPUT / f"{name}.md").write_text("\n".join(lines) + "\n")
    return outcome


def changed_lines(folder: Path, key: str) -> list[str]:
    """The lines that a mutant takes away and adds."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    with contextlib.chdir(folder):
        shown = get_diff_for_mutant(key, path=PIECES[folder.name].module).splitlines()
    return [line for line in shown if line[:1] in "+-" and not line.startswith(("---", "+++"))]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="NAME", help="pieces to run [all]")
    parser.add_argument("--list", action="store_true", help="list the pieces")
    parser.add_argument("--children", type=int, default=2, help="mutants that are tried at a time [2]")
    parser.add_argument("--again", action="store_true", help="try only the survivors of the last run")
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
        outcome = run_piece(name, arguments.children, again=arguments.again)
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
