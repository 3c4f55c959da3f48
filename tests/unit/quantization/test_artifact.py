"""Artifacts: written from a full model, read without building one, refused where they are damaged or drift too far."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.export import ExportError, export
from pipelines.fingerprint import OtherInputsError
from pipelines.settings import QuantizeSettings, SettingsError
from tests.serving_model import make_image, make_model, make_processor
from tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.checkpoint.folders import CheckpointError, write_folder, write_manifest
from tinygptv.data.conversation import ChatMessage
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.drift import HeldOut, compare
from tinygptv.inference.loading import load_for_inference
from tinygptv.inference.sampling import SamplingParams
from tinygptv.quantization.artifact import (
    METHODS,
    PACKED,
    _format_class,
    _formats,
    _rounded,
    _shards,
    is_packed,
    load_artifact,
    write_artifact,
)
from tinygptv.quantization.metadata import bits_per_weight, read_metadata, source_stage

# Largest relative error of the logits that each method may make on random weights, which round worst.
LOGIT_ERROR = {"cpu": 0.03, "cpu4": 0.35, "int8": 0.03, "int4": 0.35, "nf4": 0.35}


def make_artifact(folder, method, lora=False, encoder=""):
    write_folder(folder, lambda staging: write_artifact(staging, make_model(lora=lora), make_processor(), method,
                                                        encoder=encoder))  # fmt: skip
    return folder


def logits_of(model):
    ids = torch.arange(1, 41).reshape(2, 20)
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return {method: make_artifact(folder / method, method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_an_artifact_is_close_to_the_full_model_and_answers(artifacts, method):
    model, processor = load_for_inference(artifacts[method])
    assert relative_error(logits_of(model), logits_of(make_model())) < LOGIT_ERROR[method]
    pixels = torch.randn(2, 3, 32, 32)
    assert relative_error(model.encode_images(pixels), make_model().encode_images(pixels)) < LOGIT_ERROR[method]
    assistant = Assistant(model, processor, max_batch_size=2)
    message = ChatMessage("user", "what is it?", (assistant.open(make_image()),))
    assert assistant.answer([message], SamplingParams(max_tokens=8))
    assistant.close()


@pytest.mark.parametrize("method", METHODS)
def test_the_full_model_is_never_built(artifacts, method, monkeypatch):
    devices = []
    build = TinyGPTVForConditionalGeneration.__init__

    def watched(self, *args, **kwargs):
        build(self, *args, **kwargs)
        devices.extend({parameter.device.type for parameter in self.parameters()})

    monkeypatch.setattr(TinyGPTVForConditionalGeneration, "__init__", watched)
    model, _, metadata = load_artifact(artifacts[method])
    assert devices == ["meta"]
    formats = {part: entry["format"] for part, entry in metadata["parts"].items()}
    full = [name for name, module in model.named_modules() if is_packed(name, module, formats)]
    assert full == [], "a layer of a low-bit part is still a full one"
    stored = sum(
        tensor.nbytes for path in artifacts[method].glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert stored == metadata["bytes"] < 0.7 * sum(4 * p.numel() for p in make_model().parameters())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_computes_what_was_written(artifacts, method, tmp_path):
    first = load_artifact(artifacts[method])[0]
    again = make_artifact(tmp_path / "again", method)
    for path in artifacts[method].glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes(), "writing is not deterministic"
    assert torch.equal(logits_of(first), logits_of(load_artifact(again)[0]))


def test_weights_that_are_windows_on_one_buffer_are_written_apart(tmp_path):
    model, numbers = make_model(), torch.randn(2**20)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            window = numbers[: parameter.numel()].view(parameter.shape)
            setattr(module, name, torch.nn.Parameter(window, requires_grad=False))
    write_folder(tmp_path / "artifact", lambda staging: write_artifact(staging, model, make_processor(), "cpu"))
    loaded, _, _ = load_artifact(tmp_path / "artifact")
    position = loaded.vision_encoder.vit.pos_embed
    assert torch.equal(position, numbers[: position.numel()].view_as(position))


@pytest.mark.parametrize("method", ["cpu", "nf4"])
def test_adapters_can_be_kept(tmp_path, method):
    folder = make_artifact(tmp_path / "kept", method, lora=True)
    model, _, metadata = load_artifact(folder)
    assert metadata["lora"] == "kept"
    assert relative_error(logits_of(model), logits_of(make_model(lora=True))) < LOGIT_ERROR[method]


def test_the_image_encoder_can_stay_in_half_precision(tmp_path):
    metadata = read_metadata(make_artifact(tmp_path / "half", "cpu", encoder="half"))
    assert [metadata["parts"][part]["format"] for part in ("vision_encoder", "language_model")] == ["half", "int8"]


@pytest.mark.parametrize(
    ("method", "encoder", "expected"),
    [
        ("cpu", "", "int8 int8 int8 int8 full"),
        ("cpu", "half", "int8 int8 half half full"),
        ("cpu4", "", "int4 int8 int8 int8 full"),
        ("nf4", "", "nf4 half half half full"),
        ("nf4", "int8", "nf4 half int8 int8 full"),
    ],
)
def test_every_part_has_its_format(method, encoder, expected):
    parts = ("language_model", "lm_head", "vision_encoder", "qformer", "projector")
    assert " ".join(_formats(METHODS[method], encoder)[part] for part in parts) == expected


def test_parameters_and_bytes_are_counted_by_part(artifacts):
    metadata = read_metadata(artifacts["cpu4"])
    stored = {}
    for path in artifacts["cpu4"].glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            part = name.partition(".")[0]
            stored[part] = stored.get(part, 0) + tensor.numel() * tensor.element_size()
    numbers = {}
    for name, parameter in make_model().named_parameters():
        numbers[name.partition(".")[0]] = numbers.get(name.partition(".")[0], 0) + parameter.numel()
    assert {name: part["bytes"] for name, part in metadata["parts"].items()} == stored
    assert {name: part["parameters"] for name, part in metadata["parts"].items()} == numbers
    assert metadata["bytes"] == sum(stored.values()) and metadata["lora"] == "merged"
    assert bits_per_weight(metadata) == pytest.approx(8 * sum(stored.values()) / sum(numbers.values()))


def test_an_artifact_keeps_the_stage_of_its_checkpoint_and_no_path():
    record = {"recipe": "mini", "stage": 4, "steps": 9, "seed": 1, "init_from": "/home/me", "title": "x"}
    assert source_stage(record) == {"recipe": "mini", "stage": 4, "steps": 9} and source_stage({}) == {}


def test_files_are_filled_up_to_their_bound(monkeypatch):
    monkeypatch.setattr("tinygptv.quantization.artifact.SHARD_BYTES", 100)
    sizes = [60, 40, 60, 60, 100, 10]
    shards = _shards({f"{n}": torch.zeros(size, dtype=torch.uint8)} for n, size in enumerate(sizes))
    assert [list(shard) for shard in shards] == [["0", "1"], ["2", "3"], ["4"], ["5"]]
    assert list(_shards(iter([]))) == []


def test_what_half_precision_cannot_hold_is_refused():
    formats = {"qformer": "half", "projector": "full", "language_model": "int8"}
    assert _rounded("qformer.x", torch.ones(2), formats).dtype == torch.float16
    assert _rounded("language_model.embed_tokens.weight", torch.ones(2), formats).dtype == torch.float16
    assert _rounded("language_model.layers.0.x", torch.full((2,), 1e6), formats).dtype == torch.float32
    with pytest.raises(ValueError, match=r"qformer\.x has values beyond float16's range"):
        _rounded("qformer.x", torch.tensor([1.0, 1e6]), formats)


def test_an_unknown_method_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"method 'gguf' is unknown; there are: nf4, int4, int8, cpu, cpu4\."):
        make_artifact(tmp_path / "a", "gguf")
    assert not list(tmp_path.iterdir())


def test_damaged_artifacts_are_refused(tmp_path):
    folder = make_artifact(tmp_path / "a", "cpu")
    weights = folder / "model-00000.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)

    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"model-00000\.safetensors"):
        load_artifact(folder)
    with pytest.raises(CheckpointError, match=r"is cut off \(it has"):
        load_artifact(folder, verify=False)

    first = "language_model.layers.1.mlp.fc1.weight"
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(first[:-7])}, weights)
    with pytest.raises(CheckpointError, match=r"lacks the weights of language_model\.layers\.1\.mlp\.fc1"):
        load_artifact(folder, verify=False)

    save_file({**tensors, "language_model.layers.9.mlp.fc1.weight": tensors[first].clone()}, weights)
    with pytest.raises(CheckpointError, match=r"holds weights of language_model\.layers\.9\.mlp\.fc1"):
        load_artifact(folder, verify=False)

    weights.write_bytes(whole)
    metadata = read_metadata(folder)
    (folder / "quantization.json").write_text(json.dumps({**metadata, "format_version": 99}))
    write_manifest(folder)
    with pytest.raises(CheckpointError, match="is of version 99; this code reads"):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["nf4", "llm_int8", "int8", "int4"])
@pytest.mark.parametrize("tokens", [3, 100])
def test_a_layer_for_gpus_computes_what_the_one_for_cpus_does(name, tokens):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(128, 96).requires_grad_(False), torch.randn(tokens, 128)
    kind = _format_class(name)
    stored = kind.pack(linear, "cpu")
    packed = PACKED[name]({key: tensor.clone() for key, tensor in stored.items()}, "cpu", torch.float32)
    expected = kind.restore(stored, "cpu", torch.float32)(x)
    # The layers for CPUs round their input to 8 bits (int8) or to bfloat16 (int4; nf4 where the CPU
    # has it), and compute llm_int8's products in float16.
    assert relative_error(packed(x), expected) < {"nf4": 5e-3, "llm_int8": 2e-2, "int8": 1e-2, "int4": 1e-2}[name]
    assert relative_error(packed(x), linear(x)) < {"nf4": 0.15, "llm_int8": 0.02, "int8": 0.02, "int4": 0.15}[name]


def test_drift_is_a_difference_of_means():
    full = HeldOut(torch.tensor([1.0, 2.0]), ("red", "blue", "two", "a cat"))
    drift = compare(full, HeldOut(torch.tensor([1.5, 2.5]), ("red", "blue", "two", "a dog")))
    assert (drift.loss, drift.answer_agreement, drift.num_tokens, drift.num_answers) == (0.5, 0.75, 2, 4)
    assert drift.quantized_perplexity / drift.full_perplexity == pytest.approx(torch.e**0.5)


# ---------------------------------------------------------------------------------------------------- the export


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
    assert not list(tmp_path.iterdir())


def measured_as(*losses):
    values = iter(losses)
    return lambda *args: HeldOut(torch.tensor([next(values)]), ("a",))


def test_settings_that_cannot_be_used_are_refused_before_work(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(SettingsError, match="holds something that is no artifact"):
        export(settings(checkpoint, tmp_path / "mine"))
    with pytest.raises(SettingsError, match="method='gguf' is unknown"):
        export(settings(checkpoint, tmp_path / "a", method="gguf"))
    with pytest.raises(SettingsError, match="register_as needs MLflow"):
        export(settings(checkpoint, tmp_path / "a", register_as="tinygptv"))
    with pytest.raises(SettingsError, match="give checkpoint=DIR"):
        export(QuantizeSettings(output=str(tmp_path / "a")))
