"""``python -m tinygptv.convert``: round trips, and mistakes on the command line."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PhiForCausalLM

from tests.release_files import HEADS, language_state, load, write_language
from tinygptv.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tinygptv.checkpoint.folders import write_folder, write_manifest
from tinygptv.checkpoint.weight_files import open_weights
from tinygptv.convert.__main__ import main
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.miniature.tiny import tiny_tokenizer
from tinygptv.quantization.artifact import write_artifact

# ------------------------------------------------------------------ round trips through the command line


def test_round_trips_are_bit_exact(tmp_path, files, capsys):
    arguments = [f"--{role}={path}" for role, path in files.items()]
    heads = ["--vision-heads=4", "--qformer-heads=4", "--dtype=float32"]
    assert main(["release", *arguments, *heads, f"--output={tmp_path / 'ours'}"]) == 0
    assert "layout 3" in capsys.readouterr().out
    ours, processor, _ = load_checkpoint(tmp_path / "ours")
    direct = load(files)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), direct.state_dict().values(), strict=True))
    assert processor.image_token_id == ours.config.image_token_id
    folder = tmp_path / "ours"
    assert json.loads((folder / "stage.json").read_text()) == {"title": "converted from release files"}
    config, settings = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert (config["dtype"], config["template"]) == ("float32", "human") and settings["end_symbol"] == "###"
    assert config["architectures"] == ["TinyGPTVForConditionalGeneration"]
    assert "Converted or pretrained weights." in (folder / "README.md").read_text()

    assert main(["to-release", str(tmp_path / "ours"), f"--output={tmp_path / 'back.pth'}"]) == 0
    original, back = (torch.load(f, weights_only=True)["model"] for f in (files["checkpoint"], tmp_path / "back.pth"))
    assert set(back) == set(original) | {"Qformer.bert.embeddings.position_ids"}
    assert all(torch.equal(back[key], original[key]) for key in original)
    assert {tensor.dtype for key, tensor in back.items() if key in original} == {torch.float32}
    assert back["Qformer.bert.embeddings.position_ids"].tolist() == [list(range(512))]

    assert main(["to-phi2", str(tmp_path / "ours"), f"--output={tmp_path / 'phi'}"]) == 2
    assert "merge_lora" in capsys.readouterr().err


def test_phi2_round_trip(tmp_path, files, plain, capsys):
    """The published weights are float16; without --dtype they keep every bit."""
    write_language(tmp_path / "half", plain, "split", dtype=torch.float16)
    files = {**files, "language": tmp_path / "half"}
    arguments = [f"--{role}={path}" for role, path in files.items() if role != "checkpoint"]
    main(["release", *arguments, "--vision-heads=4", "--qformer-heads=4", f"--output={tmp_path / 'ours'}"])
    assert load_checkpoint(tmp_path / "ours")[0].dtype == torch.bfloat16, (
        "computes so unless another dtype is asked for"
    )
    assert main(["to-phi2", str(tmp_path / "ours"), f"--output={tmp_path / 'phi'}"]) == 0
    assert "left out 10 tensors of added norms" in capsys.readouterr().out
    written = {key: lazy.load() for key, lazy in open_weights(tmp_path / "phi").items()}
    wanted = {key: tensor.half() for key, tensor in language_state(plain, "split").items()}
    assert set(written) == set(wanted) and all(torch.equal(written[k].half(), wanted[k]) for k in wanted)
    phi = PhiForCausalLM.from_pretrained(tmp_path / "phi")
    assert phi.config.num_attention_heads == HEADS and phi.dtype == torch.float16
    config = json.loads((tmp_path / "phi/config.json").read_text())
    told = {key: config[key] for key in ("model_type", "architectures", "hidden_act", "vocab_size")}
    assert told == {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "hidden_act": "gelu_new",
        "vocab_size": 256,
    }
    assert not {"qk_layernorm", "attention_rmsnorm", "input_layernorm", "attention_rmsnorm_eps"} & set(config)
    assert AutoTokenizer.from_pretrained(tmp_path / "phi").chat_template is None
    direct, again = (load({**files, "checkpoint": None, "language": f}) for f in (files["language"], tmp_path / "phi"))
    supplied = direct.state_dict().keys() - set(direct.load_report.fresh)
    assert all(torch.equal(direct.state_dict()[name], again.state_dict()[name]) for name in supplied)


def test_images_have_an_id_that_no_token_has(tmp_path, files):
    """Copies of Phi-2 that were trained to chat have tokens of their own behind its vocabulary, one of them EOS."""
    tokenizer = AutoTokenizer.from_pretrained(files["language"])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "chat")
    arguments = [f"--{role}={path}" for role, path in files.items()]
    heads = ["--vision-heads=4", "--qformer-heads=4", f"--tokenizer={tmp_path / 'chat'}"]
    assert main(["release", *arguments, *heads, f"--output={tmp_path / 'ours'}"]) == 0
    model, processor, _ = load_checkpoint(tmp_path / "ours")
    assert model.config.image_token_id == processor.image_token_id == len(processor.tokenizer) == 258
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") == 256 in model.generation_config.eos_token_id


# ------------------------------------------------------------------ mistakes on the command line


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory):
    """A checkpoint with adapters, the same merged, and an artifact."""
    folder = tmp_path_factory.mktemp("checkpoints")
    processor = TinyGPTVProcessor.from_config(model.config, tiny_tokenizer())
    save_checkpoint(folder / "lora", model, processor, {})
    merged = copy.deepcopy(model)
    merged.merge_lora()
    save_checkpoint(folder / "merged", merged, processor, {})
    write_folder(folder / "artifact", lambda staging: write_artifact(staging, merged, processor, "cpu"))
    return folder


def fails(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1, err
    return err


def test_an_output_replaces_only_what_the_command_wrote(checkpoints, tmp_path, capsys):
    source, phi = checkpoints / "merged", tmp_path / "phi"
    for _ in range(2):
        assert main(["to-phi2", str(source), f"--output={phi}"]) == 0
    capsys.readouterr()
    (phi / "notes.txt").write_text("mine")
    assert "holds notes.txt" in fails(capsys, "to-phi2", source, f"--output={phi}")
    (tmp_path / "file").write_text("mine")
    assert "is a file that would be deleted" in fails(capsys, "to-phi2", source, f"--output={tmp_path / 'file'}")
    assert "would change the input" in fails(capsys, "to-phi2", source, f"--output={source}")
    assert "would change the input" in fails(capsys, "to-release", source, f"--output={source / 'stage.pth'}")
    for output, reason in (
        (tmp_path / "file", "exists already: move it, or give the path of a new file."),
        (tmp_path, f"is a folder: give the path of a new file, for example {tmp_path}/stage.pth."),
        (tmp_path / "no/such/s.pth", f"cannot be written: the folder {tmp_path}/no/such does not exist."),
    ):
        assert fails(capsys, "to-release", source, f"--output={output}") == f"error: output {output} {reason}\n"
    assert (tmp_path / "file").read_text() == (phi / "notes.txt").read_text() == "mine"


def test_the_language_folder_is_never_the_output(files, tmp_path, capsys):
    before = {path: path.read_bytes() for path in files["language"].iterdir()}
    arguments = [f"--{role}={path}" for role, path in files.items()]
    assert "would change the input" in fails(capsys, "release", *arguments, f"--output={files['language']}")
    assert before == {path: path.read_bytes() for path in files["language"].iterdir()}


def test_what_kind_of_checkpoint_was_given_is_checked(checkpoints, files, tmp_path, capsys):
    out = f"--output={tmp_path / 'x'}"
    for command in ("to-release", "to-phi2"):
        assert fails(capsys, command, checkpoints / "artifact", out) == (
            f"error: {checkpoints}/artifact is a quantized artifact, whose weights are rounded: give the checkpoint "
            "that it was made from.\n"
        )
    assert fails(capsys, "to-release", checkpoints / "merged", out) == (
        f"error: the LoRA adapters of {checkpoints}/merged are merged into its weights, and a stage file of the "
        "release holds adapters: give the checkpoint from before the merge.\n"
    )
    assert fails(capsys, "to-phi2", checkpoints / "lora", out) == (
        f"error: {checkpoints}/lora holds LoRA adapters, which plain Phi-2 cannot: add --merge-lora to fold them into "
        "the weights (in Python, model.merge_lora()).\n"
    )
    others = [f"--{role}={path}" for role, path in files.items() if role != "language"]
    for kind, reason in (("lora", "is a checkpoint of this project"), ("artifact", "is a quantized artifact")):
        assert reason in fails(capsys, "release", *others, f"--language={checkpoints / kind}", out)
    weights = checkpoints / "lora/model.safetensors"
    whole = weights.read_bytes()
    try:
        tensors = load_file(weights)
        save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.bias"}, weights)
        write_manifest(checkpoints / "lora")
        for command in ("to-release", "to-phi2"):
            assert "lm_head.bias" in fails(capsys, command, checkpoints / "lora", out)
        weights.write_bytes(whole)
        for command in ("to-release", "to-phi2"):
            assert "model.safetensors" in fails(capsys, command, checkpoints / "lora", out), (
                "not of the manifest's size"
            )
    finally:
        weights.write_bytes(whole)
        write_manifest(checkpoints / "lora")
    assert not (tmp_path / "x").exists()


def test_mistakes_are_found_before_anything_is_read(files, tmp_path, capsys):
    out = f"--output={tmp_path / 'x'}"
    arguments = [f"--{role}={path}" for role, path in files.items()]
    assert "--template vicuna is unknown" in fails(capsys, "release", *arguments, "--template=vicuna", out)
    without = [argument for argument in arguments if "--language" not in argument]
    assert "give --tokenizer" in fails(capsys, "release", *without, out)
    whole = (files["language"] / "config.json").read_text()
    (files["language"] / "config.json").write_text("[1, 2]")
    assert "holds a list where an object" in fails(capsys, "release", *arguments, out)
    (files["language"] / "config.json").write_text('{"num_attention_heads": "many"}')
    assert "num_attention_heads='many'" in fails(capsys, "release", *arguments, out)
    (files["language"] / "config.json").write_text(whole)
    for content, reason in (
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"<!doctype html>", "a web page"),
        (b"GGUF\0\0", "a GGUF file"),
    ):
        (tmp_path / "other.pth").write_bytes(content)
        others = [argument for argument in arguments if "--vision" not in argument]
        error = fails(capsys, "release", *others, f"--vision={tmp_path / 'other.pth'}", out)
        assert reason in error and "weights_only" not in error
        assert reason in fails(capsys, "release", f"--vision={tmp_path / 'other.pth'}", out), "before the tokenizer"


def test_adapters_are_merged_on_the_way(checkpoints, tmp_path):
    for kind, extra in (("lora", ["--merge-lora"]), ("merged", [])):
        assert main(["to-phi2", str(checkpoints / kind), *extra, f"--output={tmp_path / kind}"]) == 0
    ours, wanted = (open_weights(tmp_path / kind) for kind in ("lora", "merged"))
    assert ours.keys() == wanted.keys() and not any("lora" in key for key in ours)
    for key, lazy in wanted.items():
        assert torch.allclose(ours[key].load(), lazy.load(), atol=1e-6), key


def test_a_stage_file_that_cannot_be_written_leaves_nothing(checkpoints, tmp_path, monkeypatch, capsys):
    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in fails(capsys, "to-release", checkpoints / "lora", f"--output={tmp_path / 'stage.pth'}")
    assert list(tmp_path.iterdir()) == []
