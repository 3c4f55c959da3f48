"""Foreign weight files, the comparison with a configuration, and the card: what is chosen, in which order, and said."""

from __future__ import annotations

import json
import pickle
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from tinygptv.checkpoint import load_model as loading
from tinygptv.checkpoint import weight_files
from tinygptv.checkpoint.folders import CheckpointError
from tinygptv.checkpoint.model_card import model_card
from tinygptv.checkpoint.weight_files import LazyTensor, WeightFileError, open_weights


def refused(act, *arguments, kind=WeightFileError):
    with pytest.raises(kind) as caught:
        act(*arguments)
    return str(caught.value)


# ---------------------------------------------------------------------- foreign files


def test_tensors_are_listed_with_their_file_key_and_shape_and_read_one_by_one(tmp_path):
    first, second = tmp_path / "b.safetensors", tmp_path / "a.safetensors"
    save_file({"y": torch.arange(6.0).view(2, 3), "x": torch.ones(())}, first)
    save_file({"z": torch.zeros(0, 4)}, second)
    found = open_weights(str(tmp_path))
    assert next(iter(found)) == "z" and sorted(found) == ["x", "y", "z"], "files by their names"
    assert {key: (tensor.file, tensor.key, tensor.shape) for key, tensor in found.items()} == {
        "x": (first, "x", ()),
        "y": (first, "y", (2, 3)),
        "z": (second, "z", (0, 4)),
    }
    assert found["y"].load().tolist() == [[0, 1, 2], [3, 4, 5]] and found["x"].load() == 1
    save_file({"z": torch.ones(1)}, first)
    assert refused(open_weights, tmp_path) == f"z is in both {second} and {first}: keep one of them."
    save_file({}, first)
    assert refused(open_weights, first) == f"{first} holds no tensors."
    first.write_bytes(b"GGUF")
    assert refused(open_weights, first) == (
        f"{first} is a GGUF file of llama.cpp, which is not read here: take the original weights."
    )
    first.write_bytes((9).to_bytes(8, "little"))
    assert refused(open_weights, first) == (
        f"{first} is no complete safetensors file: it is cut off (its header should have 9 bytes): download it again."
    )


def test_an_index_names_its_shards_once_and_beside_itself(tmp_path, monkeypatch):
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "../3.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    wanted = [tmp_path / f"{number}.safetensors" for number in (3, 1, 2)]
    for file in wanted[1:]:
        file.touch()
    assert refused(weight_files._files, tmp_path) == f"{index} names shards that are missing: {wanted[0]}."
    wanted[1].unlink()
    assert refused(weight_files._files, index).endswith(f": {wanted[0]}, {wanted[1]}.")
    for file in wanted:
        file.touch()
    (tmp_path / "0.safetensors").touch()
    assert weight_files._files(tmp_path) == wanted == weight_files._files(index)
    assert weight_files._files(wanted[1]) == [wanted[1]]
    for name in ("a", "z"):  # the first by name counts, whatever the disk lists first
        (tmp_path / f"{name}.index.json").write_text(
            json.dumps({"weight_map": {"a": f"{'0' if name == 'a' else '1'}.safetensors"}})
        )
    monkeypatch.setattr(Path, "glob", lambda self, pattern, glob=Path.glob: sorted(glob(self, pattern), reverse=True))
    assert weight_files._files(tmp_path) == [tmp_path / "0.safetensors"]
    for name in ("a", "z"):
        (tmp_path / f"{name}.index.json").unlink()
    index.rename(tmp_path / "index")
    assert [path.name for path in weight_files._files(tmp_path)] == [f"{number}.safetensors" for number in range(4)]
    (tmp_path / "index").rename(index)
    for text in (
        "{",
        "{}",
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"a": {}}}',
        '{"weight_map": {"a": 1, "b": ""}}',
    ):
        index.write_text(text)
        assert refused(weight_files._files, tmp_path).startswith(f"{index} is no index of weight shards: ")
    for name in ("nowhere.pth", "nowhere.index.json"):
        assert refused(weight_files._files, tmp_path / name) == f"{tmp_path / name} does not exist."
    nowhere = tmp_path / "nowhere"
    assert refused(weight_files._files, nowhere) == f"{nowhere} does not exist."
    nowhere.mkdir()
    (nowhere / "optimizer.bin").touch()
    assert refused(weight_files._files, nowhere) == (
        f"{nowhere} holds no weight file; looked for *.safetensors, pytorch_model*.bin, *.pth, *.pt, *.bin and an "
        "index.json."
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_gives_copies_by_name_of_what_is_a_tensor(tmp_path, zipped):
    file = tmp_path / "a.pth"
    base = torch.arange(4.0)
    content = {"model": {"state_dict": {"module.b": base[1:3], "a": base, "n": 3, 7: torch.ones(1)}}, "epoch": 1}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    found = open_weights(file)
    assert list(found) == ["module.b", "a", "7"]
    assert {tensor.shape for tensor in found.values()} == {(2,), (4,), (1,)} and found["a"].file == file
    assert found["module.b"].load().tolist() == [1, 2] and found["a"].load().tolist() == [0, 1, 2, 3]
    assert found["7"].load().tolist() == [1]
    if zipped:
        assert found["module.b"].load().untyped_storage().nbytes() == 8, "of its own, not of the mapped file"


@pytest.mark.parametrize(("bound", "times"), [(100, 1), (32, 1), (24, 2), (15, 3), (1, 5)])
def test_a_mapped_file_is_opened_again_after_so_many_bytes(tmp_path, monkeypatch, bound, times):
    """What was read leaves the memory of the process, and the pickle is not read once per tensor."""
    tensors = {name: torch.full((2,), float(ord(name))) for name in "abcde"}
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "a.pth")
    load, opened = weight_files._load_torch, []
    monkeypatch.setattr(weight_files, "_load_torch", lambda *given, **more: opened.append(1) or load(*given, **more))
    monkeypatch.setattr(weight_files, "_MAPPED_BYTES", bound)
    found = open_weights(tmp_path / "a.pth")
    assert [found[name].load().tolist() for name in "abcde"] == [[ord(name)] * 2 for name in "abcde"]
    assert len(opened) == times


def test_wrappers_are_opened_from_outside_to_inside_and_only_if_they_hold_a_dictionary(tmp_path):
    path = tmp_path / "a.pth"
    assert weight_files._unwrap({"model": {"module": {"x": 1}, "state_dict": 2}}, path) == {"x": 1}
    assert weight_files._unwrap({"model": 1, "x": 2}, path) == {"model": 1, "x": 2}
    assert weight_files._unwrap({"optimizer": {"x": 1}}, path) == {"optimizer": {"x": 1}}
    for outer, inner in (("model", "state_dict"), ("model", "module"), ("state_dict", "module")):
        assert weight_files._unwrap({outer: {inner: {"x": 1}, "y": 2}, "z": 3}, path) == {"x": 1}
    assert refused(weight_files._unwrap, [1], path) == f"{path} holds a list; expected a dictionary of tensors."


def test_damaged_torch_files_are_one_sentence(tmp_path):
    file = tmp_path / "a.pth"
    start = f"{file} is damaged or no file of tensors, and was not opened further: "
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/other", b"x")
    assert refused(open_weights, file) == start + "it is a zip archive without data.pkl."
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 100_000)
    assert refused(open_weights, file) == start + "its entries unpack to more than the file."
    file.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    assert refused(open_weights, file) == start + "it begins like no torch file."
    torch.save([torch.ones(1)], file)
    assert refused(open_weights, file) == f"{file} holds a list; expected a dictionary of tensors."


@pytest.mark.parametrize(
    ("method", "offset", "value", "reason"),
    [
        (zipfile.ZIP_STORED, 44, b"?", "Bad CRC-32 for file 'x/data.pkl'"),  # a byte of the pickle
        (zipfile.ZIP_DEFLATED, 42, b"\xff" * 4, "Error -3 while decompressing data: "),
        (zipfile.ZIP_STORED, 0, b"X", "Bad magic number for file header"),
        (zipfile.ZIP_STORED, "C8", b"\x01", "File <ZipInfo filename='x/data.pkl'"),
        (zipfile.ZIP_STORED, "C10", b"\x63", "That compression method is not supported"),
    ],
)
def test_a_damaged_archive_is_one_sentence(tmp_path, method, offset, value, reason):
    file = tmp_path / "a.pth"
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({f"name {n}": n for n in range(20)}))
        archive.writestr("x/data/0", bytes(range(256)))
    data = bytearray(file.read_bytes())
    at = data.index(b"PK\x01\x02") + int(offset[1:]) if isinstance(offset, str) else offset
    data[at : at + len(value)] = value
    file.write_bytes(data)
    start = f"{file} is damaged or no file of tensors, and was not opened further: "
    assert refused(open_weights, file).startswith(start + reason)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("Unsupported global: GLOBAL os.system was not", "it refers to os.system"),
        ("Unsupported class numpy.core.x", "it refers to numpy.core.x"),
        ("Trying to call function builtins.eval", "it refers to builtins.eval"),
        ("anything", "it holds more than tensors"),
    ],
)
def test_what_a_refused_pickle_asked_for(tmp_path, monkeypatch, error, reason):
    def load(*args, **options):
        assert options == {"map_location": "cpu", "weights_only": True, "mmap": True}
        raise pickle.UnpicklingError(error)

    monkeypatch.setattr(torch, "load", load)
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert refused(weight_files._load_torch, file, True) == (
        f"{file} is no file of tensors alone, or is damaged; it was not opened further, because a pickle can run code "
        f"({reason})."
    )


def test_a_truncated_file_is_named_with_its_size_and_the_first_line(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    others = (EOFError, OSError, ValueError, TypeError, AttributeError)
    errors = [(RuntimeError(" first \nsecond"), "first "), (MemoryError(), "MemoryError"), (KeyError("k"), "'k'")]
    for error, line in (*errors, *((kind("why"), "why") for kind in others)):
        monkeypatch.setattr(torch, "load", lambda *args, error=error, **options: (_ for _ in ()).throw(error))
        assert (
            refused(weight_files._load_torch, file, False) == f"{file} (3 bytes) is truncated or no torch file: {line}"
        )
    for kind in (ValueError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, zlib.error):
        monkeypatch.setattr(weight_files, "_check_old_format", Mock(side_effect=kind("why")))
        told = refused(list, weight_files._open_torch(file))
        assert told == f"{file} is damaged or no file of tensors, and was not opened further: why"


# ---------------------------------------------------------------------- against the configuration


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that holds and needs what ``stored`` and ``needed`` say."""
    (tmp_path / "b.safetensors").touch()
    (tmp_path / "a.safetensors").touch()
    found = SimpleNamespace(path=tmp_path, checked=[], stored={}, needed={})
    monkeypatch.setattr(loading, "check_weight_file", lambda path: found.checked.append(path.name))
    monkeypatch.setattr(
        loading, "open_weights", lambda path: {k: LazyTensor(path, k, v, None) for k, v in found.stored.items()}
    )
    monkeypatch.setattr(loading, "parameter_shapes", lambda config: found.needed)
    return found


def test_tensors_are_compared_by_name_then_shape(folder):
    def said():
        return refused(loading.check_tensors, folder.path, "config", kind=CheckpointError)

    folder.needed = {"c": (1,), "a": (2, 3), "b": (4,)}
    folder.stored = {"d": (1,)}
    assert said() == f"{folder.path} lacks tensor a and 2 more: the checkpoint is damaged or incomplete."
    assert folder.checked == ["a.safetensors", "b.safetensors"]
    folder.stored = {"c": (1,), "b": (4,), "d": (1,)}
    assert said() == f"{folder.path} lacks tensor a: the checkpoint is damaged or incomplete."
    folder.stored = folder.needed | {"e": (1,), "d": (1,)}
    assert said() == f"{folder.path} holds tensor d and 1 more, which its config.json does not have."
    folder.stored = folder.needed | {"a": (3, 2)}
    assert said() == f"a in {folder.path} has the shape [3, 2], but its config.json needs [2, 3]."
    folder.stored = dict(reversed(folder.needed.items()))
    loading.check_tensors(folder.path, "config")
    for file in folder.path.iterdir():
        file.unlink()
    (folder.path / "model.bin").touch()
    assert said() == f"{folder.path} holds no weights: it has no .safetensors file."


def test_a_model_is_loaded_strictly_and_without_the_network(tmp_path, monkeypatch):
    order, given = [], []

    class Model:
        def eval(self):
            order.append("eval")
            return self

    missing: list[str] = []

    def from_pretrained(path, **options):
        order.append("load")
        given.append((path, options))
        return Model(), {"missing_keys": missing, "unexpected_keys": [], "mismatched_keys": [], "error_msgs": ["x"]}

    monkeypatch.setattr(loading, "read_config", lambda path: order.append("config") or f"config of {path.name}")
    monkeypatch.setattr(loading, "check_tensors", lambda path, config: order.append(f"check {path.name}: {config}"))
    monkeypatch.setattr(loading, "load_processor", lambda path: f"processor of {path.name}")
    monkeypatch.setattr(loading.TinyGPTVForConditionalGeneration, "from_pretrained", from_pretrained)
    folder = tmp_path / "model"
    folder.mkdir()
    model, processor = loading.load_model(folder, device_map="cpu")
    assert isinstance(model, Model) and processor == "processor of model"
    assert order == ["config", "check model: config of model", "load", "eval"]
    assert given == [
        (
            folder,
            {
                "config": "config of model",
                "dtype": "auto",
                "local_files_only": True,
                "trust_remote_code": False,
                "use_safetensors": True,
                "output_loading_info": True,
                "device_map": "cpu",
            },
        )
    ]
    loading.load_model(folder, torch.float32)
    assert given[1][1]["dtype"] == torch.float32
    missing.append("a")
    with pytest.raises(AssertionError, match="a"):
        loading.load_model(folder)
    (folder / "quantization.json").touch()
    order.clear()
    assert "is a quantized artifact" in refused(loading.load_model, folder, kind=CheckpointError)
    assert order == ["config"], "refused before its tensors are compared"


def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "read_config", lambda path: None)
    monkeypatch.setattr(loading, "check_tensors", lambda path, config: None)
    errors = [(OSError(" no disk\n"), "no disk"), (KeyError(), "KeyError")]
    errors += [(kind("bad"), "bad") for kind in (ValueError, TypeError, RuntimeError)]
    for error, reason in errors:

        def fail(*args, error=error, **options):
            raise error

        monkeypatch.setattr(loading.TinyGPTVForConditionalGeneration, "from_pretrained", fail)
        said = refused(loading.load_model, tmp_path, kind=CheckpointError)
        assert said == f"{tmp_path} cannot be loaded: {reason}"


def test_a_processor_is_read_from_the_folder_alone_and_its_first_line_said(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        loading.TinyGPTVProcessor, "from_pretrained", lambda path, **options: given.append((path, options)) or "it"
    )
    assert loading.load_processor(tmp_path) == "it"
    assert given == [(tmp_path, {"local_files_only": True, "trust_remote_code": False})]
    start = f"the tokenizer or processor of {tmp_path} cannot be loaded: "
    for error, reason in (
        (ValueError("first\nsecond"), "first"),
        (Exception(), "Exception"),
        (ValueError("x\nset trust_remote_code"), "it needs code of its own (auto_map), which is never run"),
    ):

        def fail(*args, error=error, **options):
            raise error

        monkeypatch.setattr(loading.TinyGPTVProcessor, "from_pretrained", fail)
        assert refused(loading.load_processor, tmp_path, kind=CheckpointError) == f"{start}{reason}."
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text("[]")
        said = refused(loading.load_processor, tmp_path, kind=CheckpointError)
        assert said == f"{tmp_path / name} holds a list where an object {{...}} is expected."
        (tmp_path / name).unlink()


# ---------------------------------------------------------------------- the card


def test_the_card_says_what_the_model_is_and_what_made_it():
    sizes = [SimpleNamespace(numel=lambda: 1_234_000), SimpleNamespace(numel=lambda: 567)]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=448, num_hidden_layers=2, hidden_size=3),
        text_config=SimpleNamespace(num_hidden_layers=32, hidden_size=2560),
        num_query_tokens=32,
        lora_rank=64,
        template="inst",
    )
    model = SimpleNamespace(config=config, parameters=lambda: iter(sizes))
    record = {"stage": 4, "recipe": "paper", "init_from": "s3://a/b", "changes": {"x": 1}, "seed": 0, "loss": 0.25}
    card = model_card(model, record)
    table = card.partition("|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [
        "| parameters | 1,234,567 |",
        "| image side | 448 px |",
        "| query tokens per image | 32 |",
        "| language model | 32 layers of width 2560 |",
        "| LoRA rank | 64 |",
        "| template | inst |",
        "| stage | 4 |",
        "| recipe | paper |",
        "| init from | s3://a/b |",
        "| seed | 0 |",
        "| loss | 0.25 |",
    ]
    assert "\n\nMade by stage 4 of the recipe `paper`.\n\n" in card
    assert "Answers end with `'###'`." in card and card.startswith("---\nlibrary_name: transformers\n")
    assert "\n\nMade by stage 1 of the recipe `mini`.\n\n" in model_card(model, {"stage": 1, "recipe": "mini"})
    config.lora_rank, config.template = 0, "caption"
    card = model_card(model, {})
    assert "| LoRA rank | merged or none |\n| template | caption |\n\n" in card
    assert "\n\nConverted or pretrained weights.\n\n" in card and r"Answers end with `'\n'`." in card


def test_folders_are_taken_as_text_too(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert open_weights(str(tmp_path / "a.safetensors"))["a"].file == Path(tmp_path / "a.safetensors")


def test_only_an_index_is_read_as_an_index(tmp_path):
    for name in ("config.json", "index.json", "model.safetensors"):
        path = tmp_path / name
        path.write_text("{}")
        assert weight_files._files(path) == [path]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert weight_files._files(tmp_path / "model.safetensors.index.json") == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("checksums", [True, False])
def test_changed_bytes_of_a_torch_file_are_refused_where_it_has_checksums(tmp_path, checksums):
    file, written = tmp_path / "w.pth", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save({"a": torch.zeros(3, 1000)}, file)
    finally:
        torch.serialization.set_crc32_options(written)
    assert open_weights(file)["a"].shape == (3, 1000)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    if checksums:
        with pytest.raises(WeightFileError, match=r"w\.pth is damaged .* the bytes of w/data/0 are not the ones that"):
            open_weights(file)
    else:
        assert open_weights(file)["a"].load().count_nonzero() == 1
