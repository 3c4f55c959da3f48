"""The plan of `make released`: where it answers, with which weights, and what is refused before a download."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipelines import released
from pipelines.json_files import write_json
from pipelines.released import Plan, plan_released, serve_settings
from pipelines.settings import ReleasedSettings, SettingsError
from pipelines.storage import DiskFullError
from tinygptv.checkpoint.folders import write_folder
from tinygptv.training.memory_plan import GIB


def plan(monkeypatch, gpu=0, **settings):
    monkeypatch.setattr(released, "_free_gpu_bytes", lambda: gpu * GIB)
    return plan_released(ReleasedSettings(**settings))


@pytest.mark.parametrize(
    ("gpu", "memory", "chosen"),
    [
        (24, "32GB", ("cuda", "nf4")),
        (6, "16GB", ("cuda", "nf4")),
        (4, "16GB", ("cpu", "cpu")),
        (0, "6GB", ("cpu", "cpu4")),
    ],
)
def test_auto_takes_what_fits(monkeypatch, gpu, memory, chosen):
    found = plan(monkeypatch, gpu, memory=memory)
    assert (found.device, found.method) == chosen and found.needed <= found.free


def test_quantizing_takes_the_checkpoint_and_what_drift_needs_beside_it(monkeypatch):
    """The drift compares with answers in half precision, whose intermediate values are the larger ones."""

    def memory(config, methods, **_):
        half = set(methods.values()) == {"half"}
        return SimpleNamespace(
            weights={"vision": 5 * GIB, "language": (7 if half else 2) * GIB}, workspace=(3 if half else 1) * GIB,
            peak=GIB, allocated=GIB,
        )  # fmt: skip

    monkeypatch.setattr(released, "inference_memory", memory)
    found = plan(monkeypatch, memory="30GB")
    assert found.quantizing == (5 + 7 + 3 + 1) * GIB
    assert found.disk == found.download + (5 + 7 + 5 + 2) * GIB


def test_the_numbers_are_those_of_the_published_files(monkeypatch):
    found = plan(monkeypatch, memory="16GB")
    assert 8.5e9 < found.download < 8.6e9
    assert 19e9 < found.disk < 22e9  # downloads, a checkpoint in 16 bits, an artifact in 8
    assert 6 * GIB < found.needed < 8 * GIB < found.quantizing < 10 * GIB
    text = str(found)
    assert "8.6 GB to download" in text and "the CPU with cpu weights" in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"device": "cuda"}, "no CUDA GPU that torch can use: take device=cpu"),
        ({"memory": "3GB"}, r"does not fit this machine: cpu on cpu needs 6\.\d GiB, 3.0 are free; cpu4 on cpu"),
        ({"memory": "6GB", "method": "cpu"}, "does not fit this machine: cpu on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, settings, text):
    with pytest.raises(SettingsError, match=text):
        plan(monkeypatch, **settings)


def test_rounding_needs_more_memory_than_answering(monkeypatch, tmp_path):
    with pytest.raises(SettingsError, match=r"rounding the weights takes 8\.\d GiB .* 7.0 are free.*serve=false"):
        released._check(plan(monkeypatch, memory="7GB"), tmp_path)
    on_gpu = Plan("cuda", "nf4", needed=1, free=24 * GIB, quantizing=8 * GIB, host=7 * GIB, download=0, disk=0)
    with pytest.raises(SettingsError, match="rounding the weights"):
        released._check(on_gpu, tmp_path)


def test_a_small_disk_is_refused_and_what_is_there_counts(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    small = Plan("cpu", "cpu", needed=1, free=2, quantizing=1, host=2, download=10**9, disk=2 * 10**9)
    with pytest.raises(DiskFullError, match=r"needs about 2 GB more, and 1.0 GB are free"):
        released._check(small, tmp_path)
    with (tmp_path / "weights").open("wb") as stream:
        stream.truncate(15 * 10**8)
    released._check(small, tmp_path)


def test_the_room_is_that_of_the_files_that_servers_have(monkeypatch, tmp_path):
    """Published sizes are known; files that may be others are asked for, before anything is downloaded."""
    asked = []
    monkeypatch.setattr(released, "fetch", lambda settings: asked.append(settings) or {"num_bytes": 25})
    plan = Plan("cpu", "cpu", needed=1, free=2, quantizing=1, host=2, download=100, disk=240)
    published = released._with_stated_sizes(ReleasedSettings(), plan, tmp_path)
    assert published is plan and not asked
    changed = released._with_stated_sizes(ReleasedSettings(fetch={"accept_changed": True}), plan, tmp_path)
    assert changed == replace(plan, disk=60)
    assert [(each.dry_run, each.quiet, each.output) for each in asked] == [(True, True, f"{tmp_path}/weights")]


def test_the_container_limit_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(released, "_CGROUP_LIMITS", (str(limit), "/nowhere"))
    limit.write_text("max\n")
    unlimited = released.free_memory()
    limit.write_text(str(1))
    assert released.free_memory() == 0 < unlimited


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage=5"], "the command line: stage='5' is not usable: Input should be less than or equal to 4."),
        (["fetch.what=[stage4]"], "fetch.what= is decided by this command: give stage= in its place."),
        (["fetch.output=w"], "fetch.output= is decided by this command: give weights= in its place."),
        (["fetch.mirrors=x"], "released, fetch: unknown key 'mirrors'; did you mean 'mirror'?"),
        (["server.prot=1"], "released, server: unknown key 'prot'; did you mean 'port'?"),
        (["server.artifact=x"], "server.artifact= is made by this command; "),
    ],
)
def test_mistakes_are_told_before_anything_is_downloaded(tmp_path, monkeypatch, words, told):
    monkeypatch.setattr(released, "plan_released", lambda settings: pytest.fail("begun"))
    with pytest.raises(SettingsError) as caught:
        released.run_released(ReleasedSettings.load(None, [*words, f"output={tmp_path}"]))
    assert str(caught.value).startswith(told)


def test_the_command_line_chooses_the_stage():
    assert released.part_names(ReleasedSettings.load(None, ["stage=3"]))[-1] == "stage3"


def test_it_is_served_on_this_machine_alone():
    result = {"artifact": "/a", "plan": {"device": "cuda"}}
    settings = serve_settings(ReleasedSettings(server={"port": 9000}), result)
    assert (settings.host, settings.port, settings.num_gpus, settings.artifact) == ("127.0.0.1", 9000, 1, "/a")


def test_a_finished_artifact_is_one_of_these_inputs_and_whole(tmp_path):
    inputs = released._inputs(ReleasedSettings(stage=3, drift_samples=5), Plan("cpu", "cpu4", 1, 2, 1, 2, 1, 1))
    assert inputs == {"parts": ["vision", "qformer", "phi-2", "stage3"], "method": "cpu4", "drift_samples": 5}
    assert released.part_names(ReleasedSettings(language="phi-2-susnato"))[2:] == ["phi-2-susnato", "stage4"]
    artifact = write_folder(tmp_path / "artifact", lambda staging: (staging / "a").write_text("a"))
    result = {"artifact": str(artifact), "inputs": inputs}
    assert released._finished(tmp_path, inputs) is None
    write_json(tmp_path / "result.json", result)
    assert released._finished(tmp_path, inputs) == result
    assert released._finished(tmp_path, {**inputs, "method": "cpu"}) is None
    (artifact / "a").unlink()
    assert released._finished(tmp_path, inputs) is None


def test_a_checkpoint_is_converted_again_where_its_inputs_changed_or_it_was_not_finished(tmp_path, monkeypatch):
    from tinygptv.convert import match, write
    from tinygptv.data import processing

    converted = []

    def convert(release, folder, tokenizer, template):
        assert not (tmp_path / "checkpoint.json").exists(), "until it is whole, it is of no inputs"
        converted.append(release["checkpoint"].name)
        write_folder(folder, lambda staging: (staging / "weights").write_text("abc"))

    monkeypatch.setattr(match, "match_release", lambda **paths: paths)
    monkeypatch.setattr(write, "convert_release", convert)
    monkeypatch.setattr(processing, "load_tokenizer", lambda path: None)
    settings = ReleasedSettings(weights=str(tmp_path / "w"))
    files = {"a": "sha"}
    for stage, given, count in ((4, files, 1), (4, files, 1), (4, {"a": "other"}, 2), (3, files, 3)):
        changed = settings.model_copy(update={"stage": stage})
        assert released._convert(changed, tmp_path, given) == tmp_path / "checkpoint"
        assert len(converted) == count, (stage, given)
    (tmp_path / "checkpoint/weights").write_text("a")  # cut off
    released._convert(settings.model_copy(update={"stage": 3}), tmp_path, files)
    assert len(converted) == 4


def test_files_are_fetched_below_the_output_unless_the_settings_say_otherwise(tmp_path, monkeypatch):
    asked = []

    def fetch(settings):
        asked.append(settings)
        return {"files": {"a": {"sha256": "x"}}}

    monkeypatch.setattr(released, "fetch", fetch)
    assert released._fetch(ReleasedSettings(quiet=True, fetch={"offline": True}), tmp_path) == {"a": "x"}
    released._fetch(ReleasedSettings(weights="/w", fetch={"mirror": "http://m"}), tmp_path)
    assert [(each.output, each.offline, each.mirror, each.quiet) for each in asked] == [
        (f"{tmp_path}/weights", True, "", True),
        ("/w", False, "http://m", False),
    ]
    assert asked[0].what == ["vision", "qformer", "phi-2", "stage4"]
