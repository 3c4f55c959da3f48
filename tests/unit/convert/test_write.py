"""What conversions write, tensor by tensor and file by file, from sources that only stand for checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tinygptv.checkpoint.folders import CheckpointError
from tinygptv.checkpoint.weight_files import LazyTensor
from tinygptv.convert import write
from tinygptv.convert.write import SHARD_BYTES, check_file_output, convert_release, write_shards
from tinygptv.data.processing import TinyGPTVProcessor
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer

LAYER = "language_model.layers.0"


def lazy(tensors):
    return {name: LazyTensor(Path("f"), name, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}


# ---------------------------------------------------------------------- shards


def test_windows_on_one_buffer_are_written_apart_and_transformers_can_read_them(tmp_path):
    numbers = torch.arange(12.0)
    write_shards(tmp_path, iter([("a", numbers[:4]), ("b", numbers[4:]), ("c", numbers.view(3, 4).T)]))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"] and SHARD_BYTES == 2**30
    found = load_file(tmp_path / "model.safetensors")
    assert [found[name].flatten().tolist() for name in "ab"] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert found["c"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_are_named_in_order_and_their_bytes_summed_in_every_dtype(tmp_path):
    sizes = {"a": (3, torch.float32), "b": (2, torch.float16), "c": (4, torch.bfloat16), "d": (1, torch.int64)}
    tensors = ((name, torch.full((size,), ord(name), dtype=dtype)) for name, (size, dtype) in sizes.items())
    write_shards(tmp_path, tensors, 16)  # of 12, 4, 8 and 8 bytes: the first two fill one, and so do the others
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    assert index == {
        "metadata": {"total_size": 32},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": names[1]},
    }
    for name, (size, dtype) in sizes.items():
        found = load_file(tmp_path / index["weight_map"][name])[name]
        assert found.dtype == dtype and found.tolist() == [ord(name)] * size


# ---------------------------------------------------------------------- release -> checkpoint


def test_a_checkpoint_says_what_it_is_for_everyone_who_reads_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(write, "_all_tensors", lambda release, dtype: asked.append(dtype) or [("a", torch.ones(2))])
    release = SimpleNamespace(config=tiny_config(template="human", lora_rank=0))
    assert convert_release(release, tmp_path / "out", tiny_tokenizer(), torch.float16, "caption") == tmp_path / "out"
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())  # noqa: E731
    config, settings = read("config.json"), read("generation_config.json")
    assert asked == [torch.float16] and (config["dtype"], config["template"]) == ("float16", "caption")
    assert config["architectures"] == ["TinyGPTVForConditionalGeneration"]
    assert (settings["end_symbol"], settings["pad_token_id"]) == ("\n", 0) and 0 in settings["eos_token_id"]
    assert read("stage.json") == {"title": "converted from release files"}
    assert TinyGPTVProcessor.from_pretrained(tmp_path / "out").template == "caption"
    card = (tmp_path / "out/README.md").read_text()
    assert "| title | converted from release files |" in card and "| template | caption |" in card
    assert set(read("manifest.json")["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert load_file(tmp_path / "out/model.safetensors")["a"].tolist() == [1, 1]


# ---------------------------------------------------------------------- checkpoint -> other layouts


def test_a_source_is_checked_by_sizes_then_by_tensors_and_is_no_artifact(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(write, "verify_folder", lambda folder, hashes: asked.append(("verify", folder, hashes)))
    monkeypatch.setattr(write, "read_config", lambda folder: asked.append(("config", folder)) or "its config")
    monkeypatch.setattr(write, "check_tensors", lambda folder, config: asked.append(("tensors", folder, config)))
    assert write.read_source(tmp_path) == "its config"
    assert asked == [("verify", tmp_path, False), ("config", tmp_path), ("tensors", tmp_path, "its config")]
    (tmp_path / "quantization.json").touch()
    with pytest.raises(CheckpointError, match="is a quantized artifact, whose weights are rounded: give the "):
        write.read_source(tmp_path)
    assert asked[3:] == [("verify", tmp_path, False)]


def test_an_output_file_is_new_in_a_folder_that_is_there_and_no_input(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    with pytest.raises(CheckpointError, match="would change the input"):
        check_file_output(tmp_path / "source/stage.pth", [tmp_path / "other", tmp_path / "source"])
    monkeypatch.chdir(tmp_path)
    check_file_output(Path("stage.pth"), [tmp_path / "source"])
    Path("link.pth").symlink_to("stage.pth")
    Path("stage.pth").touch()
    for name in ("stage.pth", "link.pth"):
        with pytest.raises(CheckpointError, match=rf"^output {name} exists already"):
            check_file_output(Path(name), [])


SOURCE = {
    "projector.linear_1.weight": torch.tensor([[1.5]]).bfloat16(),
    "projector.linear_2.bias": torch.tensor([2.5]),
    f"{LAYER}.self_attn.qkv_proj.base_layer.weight": torch.arange(6.0).view(6, 1),
    f"{LAYER}.self_attn.qkv_proj.lora_A.default.weight": torch.tensor([[3.0]]).half(),
    f"{LAYER}.self_attn.qkv_proj.lora_B.default.weight": torch.arange(6.0).view(6, 1).half(),
    f"{LAYER}.self_attn.dense.base_layer.bias": torch.tensor([4.0]),
    f"{LAYER}.attention_rmsnorm.weight": torch.tensor([5.0]),
    "vision_encoder.vit.pos_embed": torch.zeros(1),
    "qformer.query_tokens": torch.zeros(1),
    "lm_head.weight": torch.tensor([[6.0]]),
    "language_model.embed_tokens.weight": torch.tensor([[7.0]]).half(),
}


@pytest.fixture
def source(monkeypatch, tmp_path):
    """A checkpoint that holds ``SOURCE``, and what is asked of it."""
    text = SimpleNamespace(num_attention_heads=2, to_dict=lambda: {"vocab_size": 9, "model_type": "x", **OWN, **ROPE})
    config = SimpleNamespace(lora_merged=False, lora_rank=2, lora_alpha=6, text_config=text)
    tokenizer = SimpleNamespace(
        chat_template="ours", save_pretrained=lambda to: (to / "tok").write_text(str(tokenizer.chat_template))
    )
    monkeypatch.setattr(write, "read_source", lambda checkpoint: config)
    monkeypatch.setattr(write, "open_weights", lambda checkpoint: lazy(SOURCE))
    monkeypatch.setattr(write, "load_processor", lambda checkpoint: SimpleNamespace(tokenizer=tokenizer))
    return config


OWN = {"qk_layernorm": 1, "attention_rmsnorm": 1, "input_layernorm": 1, "attention_rmsnorm_eps": 1, "hidden_act": "y"}
ROPE = {"dtype": None, "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 5000.0, "rope_type": "default"}}


def test_a_stage_file_holds_what_a_stage_trains_in_the_releases_names_and_order(source, tmp_path):
    output = tmp_path / "stage.pth"
    assert write.write_release_stage(tmp_path / "checkpoint", output) == output
    content = torch.load(output, weights_only=True)
    state, prefix = content["model"], "llama_model.base_model.model.model.layers.0"
    fused = f"{prefix}.self_attn.query_key_value"
    assert list(content) == ["model"] and {key: t.flatten().tolist() for key, t in state.items() if t.numel() < 9} == {
        "llama_proj.weight": [1.5],
        "llama_proj2.bias": [2.5],
        f"{fused}.lora_A.weight": [3.0],
        f"{fused}.lora_B.weight": [0, 2, 4, 1, 3, 5],
        f"{prefix}.post_layernorm.weight": [5.0],
    }
    positions = state.pop("Qformer.bert.embeddings.position_ids")
    assert positions.tolist() == [list(range(512))] and {t.dtype for t in state.values()} == {torch.float32}
    assert [path.name for path in tmp_path.iterdir()] == ["stage.pth"]
    with pytest.raises(CheckpointError, match="exists already"):
        write.write_release_stage(tmp_path / "checkpoint", output)
    source.lora_rank = 0  # the names of a model without adapters
    write.write_release_stage(tmp_path / "checkpoint", tmp_path / "plain.pth")
    names = torch.load(tmp_path / "plain.pth", weights_only=True)["model"]
    assert "llama_model.model.layers.0.post_layernorm.weight" in names
    source.lora_merged = True
    with pytest.raises(CheckpointError, match=r"adapters of .* are merged into its weights"):
        write.write_release_stage(tmp_path / "checkpoint", tmp_path / "merged.pth")


def test_plain_phi_has_its_own_names_settings_and_tokenizer(source, tmp_path):
    with pytest.raises(CheckpointError, match="holds LoRA adapters, which plain Phi-2 cannot: add --merge-lora"):
        write.write_split_phi(tmp_path / "checkpoint", tmp_path / "phi")
    left_out = write.write_split_phi(tmp_path / "checkpoint", tmp_path / "phi", merge_lora=True)
    assert left_out == [f"{LAYER}.attention_rmsnorm.weight"]
    found = {name: t.flatten().tolist() for name, t in load_file(tmp_path / "phi/model.safetensors").items()}
    attention = "model.layers.0.self_attn"
    merged = [row + 6 / 2 * row * 3 for row in range(6)]
    assert found == {
        **{f"{attention}.{part}_proj.weight": merged[2 * n : 2 * n + 2] for n, part in enumerate("qkv")},
        f"{attention}.dense.bias": [4.0],
        "lm_head.weight": [6.0],
        "model.embed_tokens.weight": [7.0],
    }
    assert json.loads((tmp_path / "phi/config.json").read_text()) == {
        "vocab_size": 9,
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "hidden_act": "gelu_new",
        "rope_parameters": ROPE["rope_parameters"],
        "partial_rotary_factor": 0.25,  # transformers before 5 turns half of each head where this is missing
        "rope_theta": 5000.0,
        "torch_dtype": "float16",
    }
    assert (tmp_path / "phi/tok").read_text() == "None", "whose chat template is not Phi-2's"


def test_a_full_disk_is_one_sentence(source, tmp_path, monkeypatch):
    def full(error):
        def save(*_, **__):
            raise error

        return save

    monkeypatch.setattr(write, "save_file", full(SafetensorError("I/O error: No space left on device (os error 28)")))
    with pytest.raises(CheckpointError, match=r"^weights cannot be written in .*: I/O error: No space left on device"):
        write.write_shards(tmp_path / ".phi.tmp", iter([("a", torch.ones(1))]))
    monkeypatch.setattr(write.torch, "save", full(RuntimeError("unexpected pos 64 vs 0")))
    with pytest.raises(CheckpointError, match=r"stage.pth cannot be written: is its disk full\? \(unexpected pos"):
        write.write_release_stage(tmp_path / "checkpoint", tmp_path / "stage.pth")
    assert not list(tmp_path.iterdir())
