"""The order of an export: what is refused before work, what is written where, what the model goes through."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import export as module
from pipelines import storage
from pipelines.export import ExportError, export
from pipelines.fingerprint import FINGERPRINT_FILE, Fingerprint, OtherInputsError
from pipelines.json_files import write_json
from pipelines.settings import QuantizeSettings, SettingsError
from tinygptv.checkpoint.folders import write_folder

METADATA = {"bytes": 9, "drift": {"loss": -0.25, "answer_agreement": 0.5}}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """An export whose work is noted and not done."""
    found = {"access": [], "inputs": [], "sent": []}
    monkeypatch.setattr(module, "checked_checkpoint", lambda location: tmp_path / f"copy of {Path(location).name}")
    monkeypatch.setattr(module, "_fingerprint", lambda settings, start: Fingerprint.of(start.name, seed=settings.seed))
    monkeypatch.setattr(module, "held_out_rows", lambda settings: (list(range(300)), f"rows of {settings.data}"))
    monkeypatch.setattr(module, "read_metadata", lambda folder: METADATA if folder.is_dir() else None)
    monkeypatch.setattr(
        module,
        "_track",
        lambda *given: found.update(tracked=given, seen=[given[2].is_dir()]),
    )
    monkeypatch.setattr(module, "_write", lambda *given: found.update(written=given) or given[2].mkdir(parents=True))
    monkeypatch.setattr(storage, "check_access", lambda at, writes=False: found["access"].append((at.uri, writes)))
    monkeypatch.setattr(module, "refuse_inputs", lambda *given: found["inputs"].append(given))
    monkeypatch.setattr(storage, "upload_folder", lambda *given: found["sent"].append(given))
    return found


def test_what_cannot_be_done_is_refused_before_any_work(calls, monkeypatch):
    for given, told in (
        ({}, "give checkpoint=DIR, the checkpoint folder to quantize."),
        (
            {"checkpoint": "c", "register_as": "x", "tracking_uri": "none"},
            "register_as needs MLflow, but tracking_uri=none switches it off: drop one of the two.",
        ),
    ):
        with pytest.raises(SettingsError) as error:
            export(QuantizeSettings(**given))
        assert str(error.value).startswith(told)
    assert calls == {"access": [], "inputs": [], "sent": []}


def test_an_artifact_is_made_and_its_result_written(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ticks = iter((100.0, 161.26))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    result = export(QuantizeSettings(checkpoint="c", tracking_uri="none", method="cpu4", data="d"))
    output = tmp_path / "outputs/mini/artifact"
    assert {key: value for key, value in result.items() if key != "seconds"} == {
        "bytes": 9,
        "drift": -0.25,  # rounded weights may be better by chance
        "answer_agreement": 0.5,
        "checkpoint": f"{tmp_path}/c",
        "artifact": str(output),
        "method": "cpu4",
        "version": None,
        "result": f"{output}/result.json",
    }
    assert result["seconds"] == 61.3 and json.loads((output / "result.json").read_text()) == result
    assert calls["access"] == [(str(output), True)] and calls["inputs"] == [([str(output)], [f"{tmp_path}/c", "d"])]
    written, start, folder, rows, data, fingerprint = calls["written"]
    assert (start, folder, rows, data) == (tmp_path / "copy of c", output, list(range(300)), "rows of d")
    assert fingerprint.inputs == {"job": "copy of c", "seed": 0} and calls["sent"] == []
    settings, *told, began = calls["tracked"]
    assert (
        (settings.method, settings.data) == ("cpu4", "d")
        and written is settings
        and told == [f"{tmp_path}/c", output, METADATA]
    )
    assert began == pytest.approx(time.time(), abs=600), "seconds since the epoch"


def test_an_artifact_of_a_bucket_is_made_here_and_sent_whole(calls, tmp_path):
    place = f"memory://artifacts/{tmp_path.name}"
    result = export(QuantizeSettings(checkpoint="c", tracking_uri="none", output=place))
    ((folder, target, last),) = calls["sent"]
    assert (target.uri, last, folder.name) == (place, "manifest.json", "artifact")
    assert folder == calls["written"][2] and folder.parent.name.startswith("artifact-")
    assert calls["seen"] == [True], "the tracker gets its files"
    assert not folder.parent.exists(), "a copy of what is in the bucket takes no room"
    assert result["artifact"] == place and json.loads(storage.read_bytes(f"{place}/result.json")) == result


def artifact(folder, fingerprint):
    def fill(staging):
        (staging / "quantization.json").write_text("{}")
        write_json(staging / FINGERPRINT_FILE, dict(fingerprint.inputs))

    return write_folder(folder, fill)


def test_only_a_whole_artifact_of_the_same_inputs_is_finished(tmp_path):
    mine, other = Fingerprint.of("quantize", seed=0), Fingerprint.of("quantize", seed=1)
    folder = tmp_path / "artifact"
    output = storage.Location.parse(str(folder))

    def finished(fingerprint=mine, **how):
        return module._finished_result(folder, output, fingerprint, **{"overwrite": False, **how})

    assert finished() is None, "nothing is there"
    folder.mkdir()
    assert finished() is None, "an empty folder"
    (folder / "notes.txt").write_text("x")
    with pytest.raises(SettingsError, match=rf"output={folder} holds something that is no artifact: give an empty or"):
        finished()
    (folder / "notes.txt").unlink(), folder.rmdir()
    folder.write_text("a file")
    with pytest.raises(SettingsError, match="holds something that is no artifact"):
        finished()
    folder.unlink()
    artifact(folder, mine)
    assert finished() is None, "its result was not written"
    result = {"bytes": 1, "version": None}
    write_json(folder / "result.json", result)
    assert finished() == result and finished(overwrite=True) is None
    with pytest.raises(OtherInputsError, match=rf"{folder} holds results of other inputs: seed was 0, is now 1"):
        finished(other)
    assert finished(other, overwrite=True) is None
    (folder / FINGERPRINT_FILE).write_text("{")
    with pytest.raises(OtherInputsError, match="seed was absent, is now 0"):
        finished()
    write_json(folder / FINGERPRINT_FILE, dict(mine.inputs))
    (folder / "quantization.json").write_text("[]")
    assert finished() == result, "files are hashed where they are loaded, which takes minutes"
    (folder / "quantization.json").write_text("{} ")
    write_json(folder / FINGERPRINT_FILE, dict(mine.inputs))
    assert finished() is None, "a file has another size than its manifest says"


class Model:
    def __init__(self, done, rank):
        self.done, self.config = done, SimpleNamespace(lora_rank=rank)

    def requires_grad_(self, wanted):
        self.done.append(("requires_grad", wanted))

    def merge_lora(self):
        self.done.append("merged")

    def parameters(self):
        return []


@pytest.mark.parametrize(("rank", "keep_lora", "merges"), [(4, False, True), (4, True, False), (0, False, False)])
def test_the_full_model_is_measured_then_what_is_served(monkeypatch, tmp_path, rank, keep_lora, merges):
    from tinygptv.checkpoint import checkpoint, stored_weights
    from tinygptv.inference import drift
    from tinygptv.quantization import artifact as artifacts

    done, metadata = [], {"bytes": 5, "method": "cpu"}
    model = Model(done, rank)
    loads = {Path("start"): (model, "processor", {"number": 3})}
    held_out = SimpleNamespace(losses=np.array([1.0]))

    def write_artifact(staging, *given, encoder):
        assert not (tmp_path / "other").exists() and staging.name not in ("artifact", "other"), "it appears at the end"
        (staging / "x").write_text("x")
        done.append(("write", given[0] is model, *given[1:], encoder))
        return metadata

    def compare(full, quantized):
        assert full is held_out is quantized
        done.append("compare")
        found = SimpleNamespace(loss=0.1, full_loss=1.0, quantized_loss=1.1)
        found.to_dict = lambda: {"loss": 0.1}
        return found

    def write_metadata(staging, content):
        assert content is metadata and (staging / "x").exists()
        done.append("metadata")

    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: loads[path])
    monkeypatch.setattr(torch.nn.Module, "to", lambda of, device: done.append(("to", of is model, str(device))))
    monkeypatch.setattr(module, "_measuring_device", lambda of, device: f"room for {of is model} by {device}")
    measured = module._measured
    monkeypatch.setattr(module, "_measured", lambda name, *given: done.append(name) or measured(name, *given))
    monkeypatch.setattr(drift, "measure", lambda of, *given: done.append(("measure", of, *given)) or held_out)
    monkeypatch.setattr(drift, "compare", compare)
    monkeypatch.setattr(artifacts, "write_artifact", write_artifact)
    monkeypatch.setattr(stored_weights, "take_stored", lambda of, start: done.append(("stored", of is model, start)))
    monkeypatch.setattr(
        artifacts,
        "load_artifact",
        lambda at, device, verify: (f"quantized on {device}", 0, 0) if (at / "x").exists() and not verify else None,
    )
    monkeypatch.setattr(module, "bits_per_weight", lambda of: 4.56789 if of is metadata else 0.0)
    monkeypatch.setattr(module, "source_stage", lambda stage: {"stage": stage["number"]})
    monkeypatch.setattr(module, "write_metadata", write_metadata)
    settings = QuantizeSettings(method="cpu", encoder="half", seed=5, max_drift=0.2, keep_lora=keep_lora)
    fingerprint = Fingerprint.of("quantize", seed=5)
    module._write(settings, Path("start"), tmp_path / "artifact", ["row"], "held-out", fingerprint)
    assert done == [
        ("requires_grad", False),
        *(["merged"] if merges else []),
        ("to", True, "room for True by cpu"),
        "full",
        ("measure", model, "processor", ["row"], 5),
        ("to", True, "cpu"),
        ("stored", True, Path("start")),
        ("write", True, "processor", "cpu", torch.device("cpu"), "half"),
        "cpu",
        ("measure", "quantized on cpu", "processor", ["row"], 5),
        "compare",
        "metadata",
    ]
    assert metadata["bits_per_weight"] == 4.568 and metadata["stage"] == {"stage": 3}
    assert metadata["drift"] == {"loss": 0.1, "max_loss": 0.2, "data": "held-out", "seed": 5}
    assert json.loads((tmp_path / "artifact" / FINGERPRINT_FILE).read_text()) == fingerprint.inputs
    told = (
        "method=cpu raises the held-out loss by 0.1000 nats per token (1.0000 to 1.1000), more than max_drift=0.01: no "
        "artifact was written; take a method with more bits, or raise max_drift."
    )
    with pytest.raises(ExportError, match=f"^{re.escape(told)}$"):
        module._write(
            settings.model_copy(update={"max_drift": 0.01}), Path("start"), tmp_path / "b", [], "", fingerprint
        )
    assert not (tmp_path / "b").exists()


def test_a_card_that_is_too_small_for_the_full_model_is_told(monkeypatch, caplog):
    caplog.set_level("INFO")
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=6 << 30)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 10**9 if device.type == "cuda" else 0, 0))
    assert module._measuring_device(model, torch.device("cuda")).type == "cpu"
    assert caplog.messages == ["the full model (6.4 GB) is measured on the CPU: the GPU has 7.0 GB free"]
    monkeypatch.setattr(
        "tinygptv.inference.drift.measure", lambda *given: SimpleNamespace(losses=np.array([1.0, 2.0]), given=given)
    )
    assert module._measured("full", 1, 2, 3, 4).given == (1, 2, 3, 4)
    assert caplog.messages[1].startswith("full model: held-out loss 1.5000 nats per token over 2 tokens (0.")


def test_drawn_rows_are_of_test_scenes_by_a_seed_of_their_own():
    rows, others = module.drawn_rows(6, seed=3), module.drawn_rows(6, seed=4)
    assert rows == module.drawn_rows(6, seed=3) and rows != others
    assert all(row.image.startswith(b"\xff\xd8") for row in rows if row.width)


def test_drawn_rows_are_of_every_kind_but_captions_without_instructions(monkeypatch):
    from tinygptv.data.sample import SampleRow
    from tinygptv.miniature import documents

    kinds = {kind: lambda scene, rng, kind=kind: SampleRow("", kind, "text", ()) for kind in ("pair", "vqa", "text")}
    monkeypatch.setattr(documents, "KINDS", kinds)
    rows = module.drawn_rows(5)
    assert [(row.id, row.source) for row in rows] == [
        (f"drawn-{n}", kind) for n, kind in enumerate(("vqa", "text", "vqa", "text", "vqa"))
    ]


def test_registering_without_mlflow_is_told(tmp_path, monkeypatch):
    from pipelines.tracking.base import NullTracker

    monkeypatch.setattr(module, "open_tracker", lambda settings, title, started: NullTracker())
    drift = {"loss": 0.1, "full_loss": 1.0, "quantized_loss": 1.1, "answer_agreement": 1.0, "num_answers": 4}
    metadata = {"bytes": 9, "method": "cpu", "drift": drift}
    given = (str(tmp_path / "c"), tmp_path / "out", metadata, 1e9)
    with pytest.raises(ExportError, match=f"{tmp_path}/out is written but not registered: MLflow cannot be used"):
        module._track(QuantizeSettings(register_as="x"), *given)
    assert module._track(QuantizeSettings(), *given) is None
