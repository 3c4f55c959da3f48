"""One strict loader at every entrance: what is missing, unexpected, misshapen or no weights at all is an error."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving_model import make_image, make_model, make_processor
from tinygptv import chat
from tinygptv.checkpoint import folders
from tinygptv.checkpoint.checkpoint import load_checkpoint, read_stage, save_checkpoint
from tinygptv.checkpoint.folders import CheckpointError, verify_folder, write_folder, write_manifest
from tinygptv.data.processing import load_tokenizer
from tinygptv.inference.loading import load_for_inference
from tinygptv.quantization.artifact import load_artifact, write_artifact


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    return save_checkpoint(folder, copy.deepcopy(make_model()), make_processor(), {"stage": 4})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    return write_folder(
        folder, lambda staging: write_artifact(staging, copy.deepcopy(make_model()), make_processor(), "cpu")
    )


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(change(state) or state, path, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def by_checkpoint(folder):
    return load_checkpoint(folder)[0]


def by_inference(folder):
    return load_for_inference(folder)[0]


ENTRANCES = [by_checkpoint, by_inference]


@pytest.mark.parametrize("load", ENTRANCES)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_whole_folder_loads(folder, load, has_manifest):
    if not has_manifest:
        (folder / "manifest.json").unlink()
        if load is by_checkpoint:
            with pytest.raises(CheckpointError, match="never finished"):
                load(folder)
            return
    model = load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), make_model().state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("load", ENTRANCES)
def test_a_flipped_byte_of_equal_size_is_refused(folder, load):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match the hash"):
        load(folder)


@pytest.mark.parametrize("load", [load_artifact, load_for_inference])
def test_a_flipped_byte_of_an_artifact_is_refused(artifact, tmp_path, load):
    copied = shutil.copytree(artifact, tmp_path / "artifact")
    load(copied)
    path = copied / "model-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match the hash"):
        load(copied)


@pytest.mark.parametrize("load", ENTRANCES)
@pytest.mark.parametrize("drop", ["projector.", "q_layernorm"])
def test_missing_tensors_are_named(folder, load, drop):
    change_weights(folder, lambda state: {k: v for k, v in state.items() if drop not in k})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut off"):
        load(folder)
    write_manifest(folder)  # whoever damaged it, also wrote the manifest
    with pytest.raises(CheckpointError, match=rf"lacks tensor \S*{drop}\S* and \d+ more"):
        load(folder)


@pytest.mark.parametrize("load", ENTRANCES)
def test_unexpected_and_misshapen_tensors_are_named(folder, load):
    change_weights(folder, lambda state: {**state, "language_model.layers.9.mlp.fc1.weight": torch.zeros(2, 2)})
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"holds tensor language_model\.layers\.9"):
        load(folder)
    change_weights(
        folder,
        lambda state: {k: v for k, v in state.items() if ".9." not in k} | {"projector.linear_2.bias": torch.zeros(3)},
    )
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"projector\.linear_2\.bias in .* has the shape \[3\], but .* needs"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (-100, r"is cut off \(it has \d+ bytes of \d+\)"),
        (20, r"is cut off \(its header should have \d+ bytes\)"),
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"GGUF" + b"\0" * 64, "a GGUF file"),
        (b"\xff" * 64, "no complete safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{}" * 40, "no complete safetensors file"),
    ],
)
def test_files_that_are_no_weights_are_named_without_a_manifest_too(folder, content, reason):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=reason) as error:
        load_for_inference(folder)
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.security
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<html><body>Sign in</body></html>", "is a web page"),
        ("[1, 2]", "holds a list where an object"),
        ("{", "is no valid JSON"),
        ("{}", "model_type in its config.json is None"),
        ('{"model_type": "llava"}', "is 'llava', not 'tinygptv'"),
        (
            '{"model_type": "tinygptv", "text_config": {"num_hidden_layers": 1000000000}}',
            "num_hidden_layers=1000000000",
        ),
        ('{"model_type": "tinygptv", "text_config": {"hidden_size": "many"}}', "hidden_size='many'"),
        ('{"model_type": "tinygptv", "text_config": {"num_hidden_layers": -1}}', "num_hidden_layers=-1"),
        (
            '{"model_type": "tinygptv", "_attn_implementation": "kernels-community/evil"}',
            "choose one of eager, sdpa, fl",
        ),
        (
            '{"model_type": "tinygptv", "text_config": {"_attn_implementation": "evil/kernel"}}',
            "choose one of eager, sdpa",
        ),
        ('{"model_type": "tinygptv", "vision_config": {"image_size": 28, "patch_size": 0}}', "can be built|usable"),
    ],
)
def test_a_config_that_is_none_is_one_sentence(folder, text, reason):
    (folder / "config.json").write_text(text)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=reason) as error:
        load_for_inference(folder)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "stage.json"])
def test_damaged_small_files_are_named(folder, name):
    (folder / name).write_text("<html>")
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=rf"{name} is a web page"):
        load_checkpoint(folder)


@pytest.mark.security
@pytest.mark.parametrize("load", [load_for_inference, load_tokenizer])
def test_code_of_a_folder_never_runs_and_nobody_is_asked(folder, tmp_path, monkeypatch, load):
    """auto_map names a Python file beside the weights; transformers would ask on the terminal whether to run it."""
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"})
    for name in ("tokenizer_config.json", "processor_config.json"):
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        values |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None], "AutoProcessor": "evil.Processor"}}
        path.write_text(json.dumps({**values, "tokenizer_class": "EvilTokenizer"}))
    (folder / "manifest.json").unlink()
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    with suppress(ValueError):
        load(folder)
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_an_artifact_is_no_start_of_training(artifact):
    with pytest.raises(CheckpointError, match="is a quantized artifact: it can be served"):
        load_checkpoint(artifact)
    load_for_inference(artifact)


def test_a_misshapen_tensor_of_an_artifact_is_named(artifact, tmp_path):
    copied = shutil.copytree(artifact, tmp_path / "artifact")
    path = copied / "model-00000.safetensors"
    save_file({**load_file(path), "projector.linear_2.bias": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"projector\.linear_2\.bias in .* has the shape \[3\]"):
        load_artifact(copied, verify=False)


def test_the_command_line_ends_with_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(make_image())
    change_weights(folder, lambda state: {k: v for k, v in state.items() if "projector." not in k})
    assert chat.main([str(tmp_path / "a.png"), "what?", "--model", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err and len(err.splitlines()) == 1


def test_stage_json_is_read(whole):
    assert read_stage(whole) == {"stage": 4} and verify_folder(whole).files["stage.json"].bytes > 0


def test_a_config_is_read_before_gigabytes_are_hashed(folder, monkeypatch):
    monkeypatch.setattr(folders, "verify_folder", lambda folder: pytest.fail("hashed first"))
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list"):
        by_inference(folder)
