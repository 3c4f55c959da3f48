"""What a file is instead of weights or JSON, how much of it is missing, and the same in a configuration."""

from __future__ import annotations

import io
import json
import re
import tarfile

import pytest

from tinygptv.checkpoint import config_file, file_kinds
from tinygptv.checkpoint.config_file import read_config
from tinygptv.checkpoint.file_kinds import FileKindError, is_tar, missing_bytes, read_json_object, wrong_kind
from tinygptv.checkpoint.folders import CheckpointError


def tar_head():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()[:512]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file: download it again"),
        (b"version https://git-lfs.github.com", "a Git LFS pointer, not the file itself: run git lfs pull in its re"),
        (b"version https://example", ""),
        (b"\xef\xbb\xbf \r\n\t<!DocType html>", "a web page (HTML), not the file itself: download it by its direct l"),
        (b"<HTML>", "a web page"),
        (b"<?xml version='1.0'?>", "a web page"),
        (b"<head>", "a web page"),
        (b" \n" * 400 + b"<html>", "a web page"),
        (b"x<html>", ""),
        (b"GGUF\0", "a GGUF file of llama.cpp, which is not read here: take the original weights"),
        (b"gguf\0", ""),
        (b"\x1f\x8b\x08", "a gzip file: unpack it"),
        (b"\x89HDF\r\n", "an HDF5 file, which is not read here: take the PyTorch or safetensors weights"),
        (tar_head(), "a tar archive: unpack it"),
        (b"{}", ""),
    ],
)
def test_a_file_is_named_for_what_it_is(tmp_path, content, kind):
    path = tmp_path / "file"
    path.write_bytes(content)
    found = wrong_kind(path)
    assert found.startswith(kind) and bool(found) == bool(kind)


def test_a_tar_header_is_known_by_its_checksum():
    head = tar_head()
    assert is_tar(head) and is_tar(head + b"\xff" * 512) and not is_tar(head[:511])
    for position in (0, 147, 156, 511):
        changed = bytearray(head)
        changed[position] ^= 1
        assert not is_tar(bytes(changed)), position
    assert not is_tar(b"\0" * 512) and not is_tar(b"9" * 512) and not is_tar(b"x" * 512)


def safetensors(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_the_bytes_that_a_weight_file_lacks_are_counted(tmp_path):
    path = tmp_path / "a.safetensors"

    def missing(content):
        path.write_bytes(content)
        return missing_bytes(path)

    header = {"b": {"data_offsets": [4, 9]}, "a": {"data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}}
    whole = safetensors(header, b"x" * 9)
    assert missing(whole) == "" == missing(whole + b"more")
    assert missing(whole[:-1]) == f"it has {len(whole) - 1} bytes of {len(whole)}"
    length = len(whole) - 8 - 9
    assert missing(whole[: 8 + length - 1]) == f"its header should have {length} bytes" == missing(whole[:8])
    assert missing(whole[: 8 + length]) == f"it has {8 + length} bytes of {len(whole)}"
    assert missing(safetensors(b"{}", b"")) == "" == missing(whole[:7])
    for damaged in (b"[]", b"{", b'{"a": {}}', b'{"a": 1}', b'{"a": {"data_offsets": ["x", "y"]}}', b"[" * 100_000):
        assert missing(safetensors(damaged, b"")) == ""
    assert missing((1).to_bytes(8, "little")) == "" == missing((100_000_001).to_bytes(8, "little"))
    assert missing((2).to_bytes(8, "little")) == "its header should have 2 bytes"
    assert missing((100_000_000).to_bytes(8, "little")) == "its header should have 100000000 bytes"


def test_a_file_that_is_no_json_object_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a.json"

    def refused(text):
        path.write_text(text)
        with pytest.raises(FileKindError) as caught:
            read_json_object(path)
        return str(caught.value)

    with pytest.raises(FileKindError, match=r"a\.json does not exist\.$"):
        read_json_object(path)
    assert refused("") == f"{path} is an empty file: download it again."
    assert refused("{1}").startswith(f"{path} is no valid JSON: Expecting property name")
    for text, kind in (
        ("[1]", "a list"),
        ('"x"', "a text"),
        ("true", "true or false"),
        ("null", "null"),
        ("1.5", "a number"),
    ):
        assert refused(text) == f"{path} holds {kind} where an object {{...}} is expected."
    assert re.fullmatch(r".* is no valid JSON: .* while decoding a JSON array .*\.", refused("[" * 100_000))
    assert file_kinds._LARGEST_JSON == 2**26, "tokenizers have tens of megabytes"
    monkeypatch.setattr(file_kinds, "_LARGEST_JSON", 8)
    path.write_text('{"é":1}')
    assert path.stat().st_size == 8 and read_json_object(path) == {"é": 1}
    assert refused('{"a": 12}') == f"{path} has 9 bytes, far too many for such a file."


def test_sizes_that_no_model_of_this_kind_has_are_refused(tmp_path):
    """Several times the paper's are read; more would take the memory before a tensor is missed."""
    layers, wide, rows = 1000, 65_536, 4_194_304
    most = {"num_hidden_layers": layers, "hidden_size": wide, "intermediate_size": 4 * wide, "vocab_size": rows}
    most |= {"encoder_hidden_size": wide, "projector_hidden_size": 4 * wide, "num_attention_heads": 4096}
    most |= {"image_size": 8192, "max_position_embeddings": rows, "num_query_tokens": 8192, "lora_rank": 8192}
    assert most == config_file._LARGEST
    for name, value in most.items():
        config_file._check_values(tmp_path, {name: value})
        for deep in ({name: value + 1}, {"text_config": {"more": {name: value + 1}}}):
            with pytest.raises(CheckpointError, match=f"has {name}={value + 1}; it must be a whole number of at mo"):
                config_file._check_values(tmp_path, deep)


def test_a_configuration_is_bounded_and_its_refusals_name_field_and_file(tmp_path):
    path = tmp_path / "config.json"

    def refused(content, folder=tmp_path):
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError) as caught:
            read_config(folder)
        return str(caught.value)

    give = "give a checkpoint folder of a stage, or an exported artifact."
    assert refused({}, tmp_path / "no") == f"{tmp_path / 'no'} does not exist: {give}"
    assert refused({}, path) == f"{path} is a file: {give}"
    assert refused({}) == (
        f"{tmp_path} is no TinyGPT-V checkpoint: model_type in its config.json is None, not 'tinygptv'."
    )
    for name, largest in config_file._LARGEST.items():
        config_file._check_values(path, {name: largest, "deep": {name: 0}})
        for value in (largest + 1, -1, 1.5, None):
            with pytest.raises(CheckpointError) as caught:
                config_file._check_values(path, {"deep": {name: value}})
            wanted = f"it must be a whole number of at most {largest}."
            assert str(caught.value) == f"{path} has {name}={value!r}; {wanted}"
    config_file._check_values(path, {"attn_implementation": None, "_attn_implementation": "sdpa", "other": 1 << 60})
    for name in ("attn_implementation", "_attn_implementation"):
        with pytest.raises(CheckpointError) as caught:
            config_file._check_values(path, {name: "a" * 100})
        assert str(caught.value).startswith(f"{path} has {name}='{'a' * 59}; choose one of eager, sdpa")
    told = refused({"model_type": "tinygptv", "text_config": {"vocab_size": -1}})
    assert told == f"{path} has vocab_size=-1; it must be a whole number of at most 4194304."
    assert refused({"model_type": "tinygptv", "text_config": 3}).startswith(f"{path} is no usable configuration: ")
    path.unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            read_config(tmp_path)
        assert str(caught.value) == f"{tmp_path} is no TinyGPT-V checkpoint: it has no config.json."
        path.mkdir(exist_ok=True)  # nor is a folder of that name one
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match=r"holds a peft adapter, which is not applied here: .* merge it"):
        read_config(tmp_path)
