"""Exports of a small checkpoint: their drift, what they belong to, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from pipelines import storage
from pipelines.export import ExportError, export
from pipelines.fingerprint import OtherInputsError
from pipelines.settings import QuantizeSettings, SettingsError
from tests.serving_model import make_model, make_processor
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.inference.drift import HeldOut
from tinygptv.inference.loading import load_for_inference
from tinygptv.quantization.metadata import read_metadata


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "stage4"
    save_checkpoint(folder, make_model(lora=True), make_processor(), {"recipe": "mini", "stage": 4, "steps": 7})
    return folder


def settings(checkpoint, folder, **changes):
    values = {"method": "cpu", "drift_samples": 4, "tracking_uri": "none", "max_drift": 50.0, **changes}
    return QuantizeSettings(checkpoint=str(checkpoint), output=str(folder), **values)


def test_an_export_measures_its_own_drift(checkpoint, tmp_path):
    result = export(settings(checkpoint, tmp_path / "artifact"))
    metadata = read_metadata(tmp_path / "artifact")
    drift = metadata["drift"]
    assert result["drift"] == drift["loss"] == pytest.approx(drift["quantized_loss"] - drift["full_loss"], abs=1e-5)
    assert result["bytes"] == metadata["bytes"] and metadata["stage"] == {
        "recipe": "mini",
        "stage": 4,
        "steps": 7,
    }
    assert metadata["lora"] == "merged" and drift["num_answers"] == 4 and 8 < metadata["bits_per_weight"] < 32
    assert json.loads((tmp_path / "artifact" / "result.json").read_text()) == result
    load_for_inference(tmp_path / "artifact")


def test_an_artifact_belongs_to_one_checkpoint_and_one_way_to_quantize(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    result = export(settings(checkpoint, folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("pipelines.export.held_out_rows", lambda settings: pytest.fail("it is finished already"))
    assert export(settings(checkpoint, folder)) == result
    other = save_checkpoint(tmp_path / "other", make_model(lora=False), make_processor(), {})
    for changes, difference in (
        ({"method": "cpu4"}, 'method was "cpu", is now "cpu4"'),
        ({"keep_lora": True}, "keep_lora was false, is now true"),
        ({"encoder": "half"}, 'encoder was "", is now "half"'),
        ({"max_drift": 9.0}, "max_drift was 50.0, is now 9.0"),
        ({"seed": 1}, "seed was 0, is now 1"),
    ):
        with pytest.raises(OtherInputsError, match=difference):
            export(settings(checkpoint, folder, **changes))
    with pytest.raises(OtherInputsError, match="checkpoint was"):
        export(settings(other, folder))
    with pytest.raises(SettingsError, match="is an input"):
        export(settings(checkpoint, checkpoint, overwrite=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    assert export(settings(checkpoint, folder, method="cpu4", overwrite=True))["method"] == "cpu4"
    assert read_metadata(folder)["method"] == "cpu4"


def test_an_export_that_was_killed_before_its_result_is_done_again(checkpoint, tmp_path):
    export(settings(checkpoint, tmp_path / "artifact"))
    for name in ("result.json", "model-00000.safetensors"):
        (tmp_path / "artifact" / name).unlink()
        assert export(settings(checkpoint, tmp_path / "artifact"))["bytes"] > 0
        load_for_inference(tmp_path / "artifact")


def test_a_drift_above_the_bound_leaves_no_artifact(checkpoint, tmp_path, monkeypatch):
    import tinygptv.inference.drift

    monkeypatch.setattr(tinygptv.inference.drift, "measure", measured_as(1.0, 1.6))
    with pytest.raises(ExportError, match=r"method=cpu raises the held-out loss by 0\.6000 .*max_drift=0\.5"):
        export(settings(checkpoint, tmp_path / "artifact", max_drift=0.5))
    monkeypatch.setattr(tinygptv.inference.drift, "measure", measured_as(1.0, float("nan")))
    with pytest.raises(ExportError, match="nan"):
        export(settings(checkpoint, tmp_path / "artifact", max_drift=0.5))
    assert [path.name for path in tmp_path.iterdir()] == [".artifact.lock"]


def measured_as(*losses):
    values = iter(losses)
    return lambda *args: HeldOut(torch.tensor([next(values)]), ("a",))


def test_settings_that_cannot_be_used_are_refused_before_work(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(SettingsError, match="holds something that is no artifact"):
        export(settings(checkpoint, tmp_path / "mine"))
    with storage.alone(str(tmp_path / "a"), is_replaced=True), pytest.raises(SettingsError, match="another run is"):
        export(settings(checkpoint, tmp_path / "a"))
    with pytest.raises(SettingsError, match="register_as needs MLflow"):
        export(settings(checkpoint, tmp_path / "a", register_as="tinygptv"))
    with pytest.raises(SettingsError, match="give checkpoint=DIR"):
        export(QuantizeSettings(output=str(tmp_path / "a")))
