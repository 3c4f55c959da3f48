"""Artifacts: written from a full model, read without building one, refused where they are damaged or drift too far."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving_model import make_image, make_model, make_processor
from tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.checkpoint.config_file import read_config
from tinygptv.checkpoint.folders import CheckpointError, write_folder, write_manifest
from tinygptv.data.conversation import ChatMessage
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.drift import HeldOut, compare
from tinygptv.inference.loading import load_for_inference
from tinygptv.inference.sampling import SamplingParams
from tinygptv.model.meta import build_on_meta
from tinygptv.model.tinygptv import FLOAT32_NAMES
from tinygptv.quantization import artifact
from tinygptv.quantization.artifact import (
    METHODS,
    PACKED,
    _formats,
    _packed_modules,
    _rounded,
    _shards,
    _StoredTensors,
    compute_dtype,
    format_class,
    is_artifact,
    is_packed,
    load_artifact,
    write_artifact,
)
from tinygptv.quantization.linear_packed import PackedLinear
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


def test_each_tensor_is_written_once_and_the_bytes_are_those_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tinygptv.quantization.artifact.SHARD_BYTES", 20_000)
    folder = make_artifact(tmp_path / "a", "cpu", lora=True)
    files = [load_file(path) for path in sorted(folder.glob("model-*.safetensors"))]
    names = [name for file in files for name in file]
    assert len(files) > 3 and len(names) == len(set(names))
    assert sum(t.nbytes for file in files for t in file.values()) == read_metadata(folder)["bytes"]
    loaded = load_artifact(folder, verify=False)[0].state_dict()
    kept = "projector.linear_1.weight"
    assert torch.equal(loaded[kept], next(file[kept] for file in files if kept in file))


def test_weights_are_rounded_on_the_device_that_was_named(monkeypatch):
    asked = []

    class Format:
        @staticmethod
        def pack(linear, device):
            asked.append((linear.weight.shape, device, torch.is_inference_mode_enabled()))
            return {"weight": linear.weight.detach()}

    monkeypatch.setattr("tinygptv.quantization.artifact.format_class", lambda name: Format)
    model = torch.nn.ModuleDict({"language_model": torch.nn.Linear(4, 2), "projector": torch.nn.Linear(2, 2)})
    stored = list(_packed_modules(model, {"language_model": "nf4", "projector": "full"}, "the device"))
    assert asked == [((2, 4), "the device", True)]
    assert [sorted(tensors) for tensors in stored] == [
        ["language_model.weight"],
        ["projector.bias", "projector.weight"],
    ]


def test_what_no_file_holds_and_nobody_computes_is_named(artifacts, monkeypatch):
    monkeypatch.setattr("tinygptv.quantization.artifact._fill_buffers", lambda model, device: None)
    with pytest.raises(CheckpointError, match=r"lacks .*(k_bias|inv_freq): export the artifact again"):
        load_artifact(artifacts["cpu"], verify=False)


def test_what_half_precision_cannot_hold_is_refused():
    formats = {"qformer": "half", "projector": "full", "language_model": "int8"}
    assert _rounded("qformer.x", torch.ones(2), formats).dtype == torch.float16
    assert _rounded("language_model.embed_tokens.weight", torch.ones(2), formats).dtype == torch.float16
    assert _rounded("language_model.layers.0.x", torch.full((2,), 1e6), formats).dtype == torch.float32
    with pytest.raises(ValueError, match=r"qformer\.x has values beyond float16's range"):
        _rounded("qformer.x", torch.tensor([1.0, 1e6]), formats)


def test_the_model_is_left_as_it_is_and_what_is_read_is_frozen(tmp_path):
    model = make_model(lora=True).train()
    model.generation_config.max_new_tokens = 7
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    folder = tmp_path / "a"
    written = []
    write_folder(folder, lambda to: written.append(write_artifact(to, model, make_processor(), "cpu4")))
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    loaded, processor, metadata = load_artifact(folder)
    assert written == [metadata] and metadata["format_version"] == 1 and metadata["method"] == "cpu4"
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.config.template == processor.template == make_processor().template
    (folder / "generation_config.json").unlink()
    assert load_artifact(folder, verify=False)[0].generation_config.max_new_tokens is None


@pytest.mark.parametrize("method", ["nf4", "cpu4"])
def test_on_a_gpu_one_kind_of_layer_multiplies_and_norms_stay_in_float32(artifacts, method):
    """No GPU is needed to see what goes where: the meta device stands for it."""
    metadata = read_metadata(artifacts[method])
    formats = {part: entry["format"] for part, entry in metadata["parts"].items()}
    model = build_on_meta(read_config(artifacts[method]))
    packed = {name for name, module in model.named_modules() if is_packed(name, module, formats)}
    with pytest.raises(CheckpointError, match="lacks "):  # the meta device keeps no numbers
        artifact._fill(model, _StoredTensors(artifacts[method]), formats, torch.device("meta"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert set(layers) == packed and {layer.dtype for layer in layers.values()} == {torch.bfloat16}
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    inside = tuple(f"{name}." for name in layers)
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            assert parameter.dtype == (torch.float32 if FLOAT32_NAMES.match(name) else torch.bfloat16), name
    for block in model.vision_encoder.vit.blocks:
        assert block.attn.qkv_bias_separate is (formats["vision_encoder"] == "int8")


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "dtype"),
    [
        ("cpu", True, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("mps", False, torch.bfloat16),
    ],
)
def test_activations_are_of_the_devices_own_dtype(monkeypatch, device, has_bfloat16, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert compute_dtype(torch.device(device)) == dtype


def test_memory_is_returned_on_a_cpu_alone(artifacts, monkeypatch):
    entered = []
    monkeypatch.setattr(artifact, "returning_memory", lambda: entered.append("entered") or nullcontext())
    monkeypatch.setattr(artifact, "_fill", lambda model, tensors, formats, device: entered.append(device.type))
    for device in ("cpu", "meta"):
        load_artifact(artifacts["cpu"], device)
    assert entered == ["entered", "cpu", "meta"]


def test_a_format_without_its_package_is_one_sentence(monkeypatch):
    def missing(name):
        raise ImportError("no", name="bitsandbytes")

    monkeypatch.setattr(artifact, "import_module", missing)
    with pytest.raises(ValueError, match=r"^weights of format nf4 need bitsandbytes, which is not installed\.$"):
        format_class("nf4")


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

    table = "language_model.embed_tokens.weight"
    save_file({**tensors, table: tensors[table][1:].clone()}, weights)
    with pytest.raises(
        CheckpointError,
        match=rf"{table} in {folder} has the shape \[399, 64\], but its config.json needs \[400, 64\]\.",
    ):
        load_artifact(folder, verify=False)

    save_file({name: tensor for name, tensor in tensors.items() if name != table}, weights)
    with pytest.raises(CheckpointError, match=rf"{folder} lacks {table}: export the artifact again"):
        load_artifact(folder, verify=False)

    flipped = bytearray(whole)
    flipped[-1] ^= 1
    weights.write_bytes(bytes(flipped))
    with pytest.raises(CheckpointError, match=r"model-00000\.safetensors"):
        load_artifact(folder)
    load_artifact(folder, verify=False)

    weights.write_bytes(whole)
    metadata = read_metadata(folder)
    for version in (99, None):
        (folder / "quantization.json").write_text(json.dumps({**metadata, "format_version": version}))
        write_manifest(folder)
        with pytest.raises(CheckpointError, match=f"is of version {version}; this code reads"):
            load_artifact(folder)
    (folder / "quantization.json").unlink()
    with pytest.raises(CheckpointError, match=r"quantization\.json .*: export the artifact again\."):
        load_artifact(folder, verify=False)
    assert not is_artifact(folder)


@pytest.mark.parametrize("name", ["nf4", "llm_int8", "int8", "int4"])
@pytest.mark.parametrize("tokens", [3, 100])
def test_a_layer_for_gpus_computes_what_the_one_for_cpus_does(name, tokens):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(128, 96).requires_grad_(False), torch.randn(tokens, 128)
    kind = format_class(name)
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
