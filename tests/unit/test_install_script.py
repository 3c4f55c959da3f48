"""deploy/install.sh with a stand-in for uv: which lock is installed where, and what happens without an index."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.paths import ROOT

CUDA_PACKAGES = re.compile(r"cuda-|nvidia-|triton==")


class Machine:
    """A folder with a stand-in for uv that notes its arguments, and fails where they hold ``fails``."""

    def __init__(self, folder):
        self.folder, self.stamp = folder, folder / ".venv/.installed"
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / "tools").mkdir()

    def install(self, *words, fails="nothing", driver=False):
        """Run the script; returns the arguments of each ``uv pip install``, and what it printed."""
        log = self.folder / "log"
        log.write_text("")
        uv = f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{fails}*) exit 1; esac\n'
        self._program(self.folder / ".venv/bin/uv", uv)
        if driver:
            self._program(self.folder / "tools/nvidia-smi", "#!/bin/sh\n")
        done = subprocess.run(
            [ROOT / "deploy/install.sh", *words], cwd=self.folder, capture_output=True, text=True, check=False,
            env={"PATH": f"{self.folder / 'tools'}:{os.defpath}"},
        )  # fmt: skip
        return done.returncode, log.read_text().splitlines(), done.stdout + done.stderr

    def _program(self, path, text):
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    if os.path.exists("/proc/driver/nvidia/version"):  # noqa: PTH110
        pytest.skip("this machine has an NVIDIA driver")
    return Machine(tmp_path)


def test_without_a_driver_the_cpu_build_is_installed(machine):
    code, calls, _ = machine.install("auto")
    assert code == 0 and machine.stamp.read_text() == "cpu\n"
    assert calls[0].endswith("--torch-backend=cpu -r requirements-cpu.lock") and "--reinstall" not in calls[0]
    assert calls[1].endswith("--no-deps -e .") and len(calls) == 2


def test_with_a_driver_the_cuda_build_is_installed(machine):
    code, calls, _ = machine.install("auto", driver=True)
    assert code == 0 and machine.stamp.read_text() == "cuda\n"
    assert "--torch-backend" not in calls[0] and calls[0].endswith("-r requirements.lock")


def test_where_the_cpu_build_cannot_be_had_the_cuda_build_is_taken_and_said(machine):
    code, calls, printed = machine.install("cpu", fails="torch-backend")
    assert code == 0 and machine.stamp.read_text() == "cuda\n"
    assert [call.split()[-1] for call in calls] == ["requirements-cpu.lock", "requirements.lock", "."]
    assert "cannot be had, as said above; its CUDA build runs on CPUs too" in printed


def test_the_other_build_replaces_the_installed_one(machine):
    machine.stamp.write_text("cpu\n")
    assert "--reinstall-package torch --reinstall-package torchvision" in machine.install("cuda")[1][0]
    assert "--reinstall" not in machine.install("cuda")[1][0]
    calls = machine.install("cpu", fails="torch-backend")[1]
    assert ["--reinstall" in call for call in calls] == [True, False, False]  # the CUDA build is still there


def test_a_failed_installation_is_not_recorded(machine):
    code, _, _ = machine.install("cuda", fails="requirements.lock")
    assert code != 0 and not machine.stamp.exists()
    code, calls, printed = machine.install("gpu")
    assert code == 2 and not calls and "TORCH=gpu is unknown: auto, cpu or cuda." in printed


def test_the_cpu_lock_is_the_lock_without_the_libraries_of_cuda():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith(" ")]
    cpu = (ROOT / "requirements-cpu.lock").read_text().splitlines()
    assert cpu == [line for line in pinned if not CUDA_PACKAGES.match(line)]
    left_out = len(pinned) - len(cpu)
    assert left_out > 15 and all("==" in line for line in cpu)
