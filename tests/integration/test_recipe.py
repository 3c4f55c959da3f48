"""README's commands at the paper's scale, run as they are written, on small files in the published layouts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import yaml

from pipelines.fetch.datasets import find_sets
from pipelines.recipe import RECORD_FILE
from tests import benchmark_files
from tests.dataset_files import BY_HAND, build, publish_data
from tests.hub_server import serve_files
from tests.integration.test_released import ask, wait_for_address
from tests.paths import ROOT
from tests.published_release import publish_release

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SECTION = (ROOT / "README.md").read_text().split("## At the paper's scale")[1].split("\n## ")[0]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```\n(.*?)```", SECTION, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
"""The documented commands, in order."""

SIZES = {
    "prepare_data": {"num_workers": 0, "min_side": 4},
    "cache_features": {"num_workers": 0, "gpus_per_worker": 0},
    "train": {
        "num_workers": 0, "use_gpu": False, "loader_workers": 0, "precision": "fp32", "micro_batch_size": 8,
        "max_steps": 2, "compile": "off",
    },
    "score": {"num_workers": 0, "gpus_per_worker": 0, "batch_size": 2, "limit": 2, "baselines": False},
    "quantize": {"method": "cpu", "drift_samples": 2, "max_drift": 100.0},
    "serve": {"num_gpus": 0, "num_cpus": 2, "object_store_mb": 100, "port": 0},
}  # fmt: skip
"""What a machine of two cores changes in configs/paper.yaml."""


class Rehearsal:
    """A folder in which the documented commands run."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.addresses = [f"hub={server.base}", f"mirror={server.base}"]
        (folder / "configs").mkdir(parents=True)
        (folder / "jobs").symlink_to(ROOT / "jobs")
        config = yaml.safe_load((ROOT / "configs/paper.yaml").read_text())
        for section, values in SIZES.items():
            config.setdefault(section, {}).update(values)
        config["tracking_uri"] = "none"
        config["whole_recipe"] = {"fetch": {"hub": server.base, "mirror": server.base, "accept_changed": True}}
        (folder / "configs/paper.yaml").write_text(yaml.safe_dump(config))

    @property
    def environment(self):
        own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(self.folder / "hf"), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, "PYTHONUNBUFFERED": "1", "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def start(self, words, log):
        words = [sys.executable if words[0] == "python" else words[0], *words[1:]]
        settings = {"cwd": self.folder, "env": self.environment, "stdout": log, "stderr": log}
        return subprocess.Popen(words, start_new_session=True, **settings)

    def run(self, words, *more):
        """Run a command to its end; returns what it printed."""
        with (self.folder / "log").open("w") as log:
            code = self.start([*words, *more], log).wait(timeout=2400)
        text = (self.folder / "log").read_text()
        assert code == 0, f"{shlex.join(words)}\n{text}"
        return text

    def install_img2dataset(self):
        """A stand-in that writes the tars of a list without downloading anything."""
        tool = self.folder / "bin/img2dataset"
        tool.parent.mkdir()
        code = (
            "import sys, pathlib; from tests.source_files import write_web_tar\n"
            "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
            "rows = len(pathlib.Path(given['--url_list']).read_text().splitlines()) - 1\n"
            "write_web_tar(pathlib.Path(given['--output_folder']) / '00000.tar', 0, rows, (64, 48))\n"
        )
        tool.write_text(f"#!{sys.executable}\n{code}")
        tool.chmod(0o755)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    with serve_files() as server:
        publish_release(server, folder / "release", image_size=224)
        publish_data(server, folder / "published")
        yield Rehearsal(folder / "work", server)


def find(*words):
    """The documented command that has these words."""
    (found,) = [command for command in COMMANDS if set(words) <= set(command)]
    return found


def test_the_documented_commands_train_the_paper_s_recipe(rehearsal):
    r = rehearsal
    raw = r.folder / "DATA"
    overview = r.run(find("jobs/fetch.py", "what=data", "dry_run=true"), *r.addresses)
    assert "together" in overview and not raw.exists()
    r.install_img2dataset()
    printed = r.run(find("jobs/fetch.py", "what=data", "output=DATA"), *r.addresses)
    assert printed.count(" in a browser, and put ") == sum(len(each.by_hand) for each in find_sets("data"))
    for command in re.findall(r"^Then run: (.*)$", printed, re.MULTILINE):
        r.run(shlex.split(command))
    for path in BY_HAND:
        build(raw / path)
    assert "in a browser" not in r.run(find("jobs/fetch.py", "what=data", "output=DATA"), *r.addresses)
    for write in (
        benchmark_files.gqa, benchmark_files.vsr, benchmark_files.iconqa, benchmark_files.vizwiz,
        benchmark_files.hateful_memes,
    ):  # fmt: skip
        write(r.folder / "official" / write.__name__)
    assert "24" in r.run(find("jobs/plan_memory.py"))

    recipe = find("jobs/recipe.py", "benchmarks=official")
    dry = r.run(find("jobs/recipe.py", "dry_run=true"))
    assert not (r.folder / "outputs/paper/weights").exists()
    check_listed_commands(dry.replace(f"{r.folder}/", ""))

    kill_in_stage_3(r, recipe)
    text = r.run(recipe)
    steps = re.split(r"^== ", text, flags=re.MULTILINE)[1:]
    done = [step.splitlines()[0] for step in steps if "\ndone already" in step]
    assert done[:2] == ["fetch", "convert"] and "stage 2: pre-training" in done
    assert not [title for title in done if title.startswith(("stage 3", "stage 4", "score", "quantize"))]
    result = json.loads((r.folder / "outputs/paper/result.json").read_text())
    assert {plan["choice"] for plan in result["features"]} == {"cached", "inline"}
    scores = json.loads((r.folder / "outputs/paper/score/result.json").read_text())
    assert scores

    r.server.requests.clear()
    r.run(recipe)
    again = json.loads((r.folder / "outputs/paper/result.json").read_text())
    assert set(again["seconds"].values()) == {0.0} and not r.server.requests

    answer_once(r, find("jobs/serve_http.py"))


def check_listed_commands(dry):
    """README's list, to be run one by one, has the words of the recipe's own commands."""
    printed = [shlex.split(line) for line in dry.splitlines() if line.startswith("python ")]
    listed = COMMANDS[COMMANDS.index(find("jobs/fetch.py", "what=start")) : -1]
    moved = {"weights": "outputs/paper/weights", "data": "outputs/paper/data"}
    for command in listed:
        words = set()
        for word in command:
            key, equals, value = word.rpartition("=")
            first, slash, rest = value.partition("/")
            words.add(f"{key}{equals}{moved.get(first, first)}{slash}{rest}")
        if "jobs/score.py" in command:
            continue  # the dry run has no benchmarks
        assert any(words <= set(step) for step in printed), shlex.join(command)


def kill_in_stage_3(r, recipe):
    """Kill the recipe and its step once stage 2 is done."""
    record = r.folder / "outputs/paper" / RECORD_FILE
    with (r.folder / "killed").open("w") as log:
        process = r.start(recipe, log)
        try:
            while "stage 2" not in (record.read_text() if record.exists() else ""):
                assert process.poll() is None, (r.folder / "killed").read_text()
                time.sleep(0.2)
            time.sleep(1)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


def answer_once(r, serve):
    """The documented server, without its GPU."""
    words = [word for word in serve if not word.startswith("num_gpus=")]
    small = [f"{key}={value}" for key, value in SIZES["serve"].items()]
    with (r.folder / "served").open("w") as log:
        process = r.start([*words, *small, "tracking_uri=none"], log)
    try:
        assert ask(wait_for_address(process, r.folder / "served"))
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) == 0, (r.folder / "served").read_text()
