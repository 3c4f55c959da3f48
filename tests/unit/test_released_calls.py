"""The released model in one command: its steps in their order, what it prints, and what is kept of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines import export as export_module
from pipelines import released
from pipelines.fingerprint import OtherInputsError
from pipelines.released import MARGIN_BYTES, Plan, run_released
from pipelines.settings import ReleasedSettings, SettingsError
from pipelines.storage import DiskFullError
from tinygptv.checkpoint.folders import write_folder
from tinygptv.config import TinyGPTVConfig
from tinygptv.quantization.artifact import METHODS
from tinygptv.training.memory_plan import GIB, inference_memory

PLAN = Plan("cpu", "cpu4", 3 * GIB, 5 * GIB, 7 * GIB, 9 * GIB, 2_540_000_000, 11_400_000_000)


@pytest.fixture
def steps(monkeypatch):
    """The steps, noted and not done."""
    done = []

    def step(name, result):
        monkeypatch.setattr(released, name, lambda *given: done.append((name, *given)) or result)

    step("plan_released", PLAN)
    step("_finished", None)
    monkeypatch.setattr(released, "_with_stated_sizes", lambda settings, plan, output: (settings, plan, output))
    step("_check", None)
    step("_fetch", {"a.pth": "sha"})
    step("_convert", Path("/checkpoint"))
    step("_quantize", {"artifact": "/artifact", "bytes": 5, "drift": 0.25, "more": 1})
    return done


def test_each_step_gets_what_the_one_before_made(steps, tmp_path, capsys):
    settings = ReleasedSettings(output=str(tmp_path / "out"), stage=2, drift_samples=3)
    result = run_released(settings)
    inputs = {"parts": ["vision", "qformer", "phi-2", "stage2"], "method": "cpu4", "drift_samples": 3}
    output = tmp_path / "out"
    assert steps == [
        ("plan_released", settings),
        ("_finished", output, inputs),
        ("_check", (settings, PLAN, output), output),
        ("_fetch", settings, output),
        ("_convert", settings, output, {"a.pth": "sha"}),
        ("_quantize", settings, PLAN, Path("/checkpoint"), output),
    ]
    assert (
        result
        == json.loads((output / "result.json").read_text())
        == {
            "artifact": "/artifact",
            "bytes": 5,
            "drift": 0.25,
            "inputs": inputs,
            "plan": asdict(PLAN),
            "files": {"a.pth": "sha"},
            "result": f"{output}/result.json",
        }
    )
    assert capsys.readouterr().out == f"{PLAN}\n"


def test_a_finished_artifact_is_returned_as_it_is(steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(released, "_finished", lambda output, inputs: {"artifact": "x"})
    assert run_released(ReleasedSettings()) == {"artifact": "x"}
    assert capsys.readouterr().out == f"The artifact is ready: {tmp_path}/outputs/released/artifact\n"
    assert [step[0] for step in steps] == ["plan_released"]


def test_a_plan_in_words():
    assert str(PLAN) == (
        "Plan: answer on the CPU with cpu4 weights: 3.0 GiB of 5.0 GiB of memory. Before that: 2.5 GB to download, "
        "11 GB of disk in all, 7.0 of 9.0 GiB of the machine's memory to round the weights."
    )
    assert str(Plan("cuda", "nf4", 1, 1, 1, 1, 1, 1)).startswith("Plan: answer on the GPU with nf4 weights: ")


def test_memory_and_disk_at_their_bounds(tmp_path, monkeypatch):
    def plan(quantizing, disk):
        return Plan("cpu", "cpu", 1, 1, quantizing, 2 * GIB, 1, disk)

    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").write_bytes(b"x" * 500)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    released._check(plan(2 * GIB, 10**9 - MARGIN_BYTES + 1500), tmp_path)
    with pytest.raises(SettingsError, match=r"takes 2\.0 GiB of memory, and 2\.0 are free"):
        released._check(plan(2 * GIB + 1, 1), tmp_path)
    with pytest.raises(DiskFullError, match=rf"{tmp_path} needs about 1 GB more, and 1\.0 GB are free: free some"):
        released._check(plan(1, 10**9 - MARGIN_BYTES + 1501), tmp_path)


def test_what_is_quantized_and_how_a_stale_artifact_is_replaced(tmp_path, monkeypatch, capsys):
    asked = []

    def export(settings):
        asked.append(settings)
        if len(asked) == 2:
            raise OtherInputsError("of another method")
        return len(asked)

    monkeypatch.setattr(export_module, "export", export)
    settings = ReleasedSettings(drift_samples=3, quiet=True)
    for count in (1, 3):
        assert released._quantize(settings, PLAN, Path("/checkpoint"), tmp_path) == count
    assert [each.overwrite for each in asked] == [False, False, True]
    for each in asked:
        assert (each.checkpoint, each.method, each.output) == ("/checkpoint", "cpu4", f"{tmp_path}/artifact")
        assert (each.drift_samples, each.tracking_uri, each.quiet) == (3, "none", True)
    assert capsys.readouterr().out == "Quantizing (cpu4) and comparing with the full model ...\n" * 2


def test_free_memory_is_that_of_the_machine_or_what_its_container_leaves(tmp_path, monkeypatch):
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10))
    monkeypatch.setattr(released.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    monkeypatch.setattr(released.psutil, "swap_memory", lambda: SimpleNamespace(free=20))
    monkeypatch.setattr(released.psutil, "Process", lambda: process)
    monkeypatch.setattr(released, "_CGROUP_LIMITS", (str(tmp_path / "max"), str(tmp_path / "old")))
    assert released.free_memory() == 120
    for text, free in ((" 90\n", 80), ("max", 120), ("5", 0), ("999", 120), ("", 120)):
        (tmp_path / "max").write_text(text)
        assert released.free_memory() == free, text
    (tmp_path / "old").write_text("70")
    assert released.free_memory() == 60


def test_a_server_answers_with_two_thousand_tokens_beside_its_own_two_gigabytes():
    assert released._CGROUP_LIMITS == (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ), "of both versions of control groups"
    config = TinyGPTVConfig.mini()
    for method in ("cpu", "nf4"):
        memory = inference_memory(config, vars(METHODS[method]), num_tokens=2048)
        assert released.needed_bytes(config, "cpu", method) == memory.allocated + 2 * GIB
        assert released.needed_bytes(config, "cuda", method) == memory.peak != memory.allocated


def test_free_memory_of_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert released._free_gpu_bytes() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 80))
    assert released._free_gpu_bytes() == 7


def test_a_cpu_asks_no_card(monkeypatch):
    monkeypatch.setattr(released, "_free_gpu_bytes", lambda: pytest.fail("asked"))
    assert released.plan_released(ReleasedSettings(device="cpu", memory="32GB")).device == "cpu"


def test_paths_of_the_parts_are_absolute(tmp_path, monkeypatch, capsys):
    from tinygptv.convert import match, write
    from tinygptv.data import processing

    given, made = {}, []
    monkeypatch.setattr(match, "match_release", lambda **paths: given.update(paths) or "release")
    monkeypatch.setattr(write, "convert_release", lambda *words, **more: made.append((*words, more)))
    monkeypatch.setattr(processing, "load_tokenizer", lambda path: ("tokenizer", path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    released._convert(ReleasedSettings(weights="w", stage=4), Path("out").absolute(), {"a": "sha"})
    assert given.pop("image_size") == 448 and given.pop("projection") is None
    assert set(given) == {"vision", "qformer", "language", "checkpoint"}
    assert all(path.is_absolute() and path.is_relative_to(tmp_path / "w") for path in given.values())
    tokenizer = ("tokenizer", given["language"])
    assert made == [("release", tmp_path / "out/checkpoint", tokenizer, {"template": "inst"})], (
        "in the files' precision"
    )
    assert capsys.readouterr().out == f"Converting to {tmp_path}/out/checkpoint ...\n"
    record = json.loads((tmp_path / "out/checkpoint.json").read_text())
    assert record == {"job": "convert", "files.a": "sha", "stage": 4}
    write_folder(tmp_path / "out/checkpoint", lambda staging: (staging / "a").touch())
    released._convert(ReleasedSettings(weights="w", stage=4), tmp_path / "out", {"a": "sha"})
    assert capsys.readouterr().out == f"The checkpoint is converted already: {tmp_path}/out/checkpoint\n"
    (tmp_path / "other").mkdir()
    released._convert(ReleasedSettings(stage=4), tmp_path / "other", {})
    assert given["vision"].is_relative_to(tmp_path / "other/weights")


@pytest.mark.parametrize(
    ("device", "method", "gpu", "host", "chosen"),
    [
        ("auto", "", 40, 90, ("cuda", "nf4", 40, 40)),
        ("auto", "", 39, 90, ("cpu", "cpu", 90, 90)),
        ("auto", "", 0, 89, ("cpu", "cpu4", 50, 89)),
        ("cpu", "", 99, 90, ("cpu", "cpu", 90, 90)),
        ("cuda", "", 99, 1, ("cuda", "nf4", 40, 99)),
        ("auto", "int8", 70, 1, ("cuda", "int8", 70, 70)),
    ],
)
def test_the_first_device_and_the_most_exact_method_that_fit_are_planned(
    monkeypatch, device, method, gpu, host, chosen
):
    needs = {("cuda", "nf4"): 40, ("cpu", "cpu"): 90, ("cpu", "cpu4"): 50, ("cuda", "int8"): 70, ("cpu", "int8"): 80}
    configs = []
    monkeypatch.setattr(released, "_free_gpu_bytes", lambda: gpu)
    monkeypatch.setattr(released, "free_memory", lambda: host)
    monkeypatch.setattr(released, "needed_bytes", lambda config, *how: configs.append(config) or needs[how])
    monkeypatch.setattr(released, "_plan", lambda *given: given)
    settings = ReleasedSettings(device=device, method=method, stage=4)
    given, config, *planned, machine = released.plan_released(settings)
    assert (given, tuple(planned), machine) == (settings, chosen, host) and config is configs[-1]
    assert config.to_dict() == TinyGPTVConfig.phi2(image_size=448, lora_rank=0).to_dict()


def test_what_was_too_large_is_told_for_every_try(monkeypatch):
    monkeypatch.setattr(released, "_free_gpu_bytes", lambda: GIB)
    monkeypatch.setattr(released, "free_memory", lambda: 2 * GIB)
    monkeypatch.setattr(released, "needed_bytes", lambda config, device, method: 3 * GIB)
    with pytest.raises(SettingsError) as caught:
        released.plan_released(ReleasedSettings())
    tries = [("nf4 on cuda", "1.0"), ("cpu on cpu", "2.0"), ("cpu4 on cpu", "2.0")]
    assert str(caught.value) == (
        "the released model does not fit this machine: "
        f"{'; '.join(f'{what} needs 3.0 GiB, {free} are free' for what, free in tries)}. Close other programs, or take "
        "another machine."
    )
    monkeypatch.setattr(released, "_free_gpu_bytes", lambda: 0)
    with pytest.raises(SettingsError) as caught:
        released.plan_released(ReleasedSettings(device="cuda"))
    assert str(caught.value) == "device=cuda, but there is no CUDA GPU that torch can use: take device=cpu."


def test_a_wrong_key_of_the_server_or_of_fetching_is_told_with_its_section(tmp_path):
    result = {"artifact": "/a", "plan": {"device": "cpu"}}
    with pytest.raises(SettingsError, match=r"^released, server: "):
        released.serve_settings(ReleasedSettings(server={"prt": 1}), result)
    with pytest.raises(SettingsError, match=r"^released, fetch: "):
        released._fetch(ReleasedSettings(fetch={"offlin": True}), tmp_path)
