"""Jobs that are killed in the middle of their work: at a call of one of their functions, however fast they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tests.paths import ROOT

_CODE = """
import importlib, os, runpy, signal, sys
job, function, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
module, _, names = function.partition(":")
owner = importlib.import_module(module)
*within, name = names.split(".")
for each in within:
    owner = getattr(owner, each)
original, calls = getattr(owner, name), []
def killing(*arguments, **named):
    calls.append(1)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)
setattr(owner, name, killing)
sys.argv[:4] = [job]
sys.path[0] = os.path.dirname(job)
runpy.run_path(job, run_name="__main__")
"""


def run_killed(job: str, words: Sequence[str], function: str, call: int, env: Mapping[str, str] | None = None) -> None:
    """Run a job until a call of one of its functions, where SIGKILL ends its process.

    Args:
        job: its script, relative to the repository.
        words: of its command line.
        function: ``module:name`` or ``module:Class.name``; called in the job's own process.
        call: number of the call, from 1 on, that is not made.
        env: its environment; None for this process's.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CODE, job, function, str(call), *words],
        cwd=ROOT,
        env={**(os.environ if env is None else env), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, f"{done.returncode}: it was not killed\n{done.stdout}{done.stderr}"
