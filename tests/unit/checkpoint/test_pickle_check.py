"""A few bytes of a pickle cannot ask for gigabytes: opcodes are read before anything unpickles them."""

from __future__ import annotations

import io
import pickle
import random
import resource
import subprocess
import sys

import pytest
import torch

from pipelines.data.sources.pickles import load_plain_pickle
from tests.paths import ROOT
from tinygptv.checkpoint.pickle_check import PickleError, check_pickle
from tinygptv.checkpoint.weight_files import WeightFileError, open_weights

pytestmark = pytest.mark.security

HUGE = b"\xff\xff\xff\x7f"
BOMBS = {
    "memo index": b"\x80\x02r" + HUGE + b".",
    "memo index in text": b"p999999999\n.",
    "memo get": b"\x80\x02j" + HUGE + b".",
    "byte array": b"\x80\x05\x96" + b"\xff" * 7 + b"\x00abc.",
    "bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00abc.",
    "text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00abc.",
    "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x00.",
    "long": b"\x80\x02\x8b" + HUGE + b"1.",
    "cut off": b"\x80\x02]",
    "no pickle": b"hello",
    "empty": b"",
}

VALUE = [{"a": [1, 2.5, "x" * 300, b"y" * 70_000, 10**50, (None, True)]}, {3, 4}, "ä\n", -5]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_pickle_writes_passes(protocol):
    data = pickle.dumps([VALUE] * 3 + [object], protocol=protocol)
    assert check_pickle(data) == len(data)
    assert check_pickle(b"xx" + data + b"more", 2) == len(data) + 2


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name):
    with pytest.raises(PickleError):
        check_pickle(BOMBS[name])
    with pytest.raises(ValueError, match="not a readable pickle"):
        load_plain_pickle(BOMBS[name])


@pytest.mark.parametrize("start", [b"", b"N" * 10])
def test_a_memo_index_may_lead_the_opcodes_by_so_much(start):
    most = 65536 + len(start)
    for largest, beyond in (
        *((opcode + b"%d\n" % most, opcode + b"%d\n" % (most + 1)) for opcode in (b"p", b"g")),
        *((opcode + most.to_bytes(4, "little"), opcode + (most + 1).to_bytes(4, "little")) for opcode in (b"r", b"j")),
    ):
        assert check_pickle(start + largest + b".") == len(start + largest) + 1
        with pytest.raises(PickleError, match=rf"^it names memo entry .*{most + 1}.* after {len(start)} opcodes\.$"):
            check_pickle(start + beyond + b".")
    with pytest.raises(PickleError, match=r"^it names memo entry b'-1\\n' after 0 opcodes\.$"):
        check_pickle(b"p-1\n.")


def test_the_number_of_opcodes_is_bounded():
    with pytest.raises(PickleError, match="more than 100 opcodes"):
        check_pickle(b"N" * 100 + b".", max_opcodes=100)
    assert check_pickle(b"N" * 99 + b".", max_opcodes=100) == 100
    assert check_pickle(b"N" * 100_000 + b".") == 100_001, "the lists of a data set are much longer"
    assert check_pickle(b"c\n\n.") == 4, "lines may be empty"


def test_reading_a_bomb_takes_no_memory(tmp_path):
    """In a process that may not take more than a gigabyte beyond what its libraries need."""
    (tmp_path / "refs.p").write_bytes(BOMBS["memo index"])
    code = f"""
import resource
from pipelines.data.sources.pickles import load_plain_pickle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_plain_pickle(open({str(tmp_path / "refs.p")!r}, "rb").read())
except ValueError as error:
    print("refused", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000)
"""
    limit = 3 << 30
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.stdout.split() == ["refused", "True"], done.stderr


# ------------------------------------------------------------------ weight files


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


class Big:
    def __reduce__(self):
        return (bytearray, (1 << 40,))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("thing", "reason"), [(Evil(), "it refers to print"), (Big(), "it refers to .*bytearray")])
def test_a_weight_file_neither_runs_code_nor_takes_memory(tmp_path, capsys, zipped, thing, reason):
    torch.save({"a": thing}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightFileError, match=reason) as error:
        open_weights(tmp_path / "x.pth")
    assert "weights_only" not in str(error.value) and "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_as_weights_is_refused(tmp_path, name):
    (tmp_path / "x.pth").write_bytes(BOMBS[name])
    with pytest.raises(WeightFileError, match=r"x\.pth is (damaged|an empty)"):
        open_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("number", range(5))
def test_each_pickle_of_an_old_file_is_checked(tmp_path, number):
    """Magic number, protocol, system, content and keys stand before the values."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    data, start = (tmp_path / "x.pth").read_bytes(), 0
    for _ in range(number):
        start = check_pickle(data, start)
    (tmp_path / "x.pth").write_bytes(data[:start] + BOMBS["memo index"])
    with pytest.raises(WeightFileError, match="it names memo entry 2147483647 after 1 opcodes"):
        open_weights(tmp_path / "x.pth")


def test_a_zip_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"N" * 10_000_000)
    with pytest.raises(WeightFileError, match="unpack to more than the file"):
        open_weights(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:  # to twice its size
        archive.writestr("x/data.pkl", random.Random(0).randbytes(5000).hex())
    with pytest.raises(WeightFileError, match="unpack to more than the file"):
        open_weights(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(WeightFileError, match=r"without data\.pkl"):
        open_weights(tmp_path / "y.pth")


def test_a_tar_given_as_weights_never_reaches_torch(tmp_path):
    """torch's oldest format is a tar, and a crafted one loops for ever in unpatched interpreters."""
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    (tmp_path / "x.pth").write_bytes(file.getvalue())
    with pytest.raises(WeightFileError, match="is a tar archive"):
        open_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors.bin"])
def test_every_pickle_of_an_archive_is_checked_and_makes_no_memory(tmp_path, module, name):
    """Python 2's and 3's name of the one thing that torch would make of any size."""
    import zipfile

    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("b/data.pkl", f"c{module}\nbytearray\n.")
    with pytest.raises(WeightFileError, match=f"it refers to {module}.bytearray, which no weights need"):
        open_weights(tmp_path / name)


# ------------------------------------------------------------------ opcodes


@pytest.mark.parametrize(
    ("code", "width"),
    [(b"U", 1), (b"\x8c", 1), (b"C", 1), (b"\x8a", 1), (b"T", 4), (b"X", 4), (b"B", 4), (b"\x8b", 4), (b"\x8d", 8),
     (b"\x8e", 8), (b"\x96", 8)],
)  # fmt: skip
@pytest.mark.parametrize("length", [0, 3, 200, 0x0102])
def test_a_length_has_its_width_and_its_low_byte_first(code, width, length):
    if length > 255 and width == 1:
        return
    body = b"." * length  # each byte of it could be taken for the end
    data = code + length.to_bytes(width, "little") + body
    assert check_pickle(data + b".") == len(data) + 1
    with pytest.raises(PickleError, match=r"^it is cut off\.$"):
        check_pickle(data)
    with pytest.raises(PickleError, match=r"^it is cut off\.$"):
        check_pickle(data[:-1] if length else data[:1])


def test_a_frame_fits_into_the_file_and_no_more():
    frame = lambda size: b"\x95" + size.to_bytes(8, "little")  # noqa: E731
    assert check_pickle(b"xy" + frame(4) + b"NNN.", 2) == 2 + 9 + 4
    with pytest.raises(PickleError, match=r"^it is cut off within a frame\.$"):
        check_pickle(b"xy" + frame(5) + b"NNN.", 2)


@pytest.mark.parametrize("code", [b"c", b"(i"])
def test_names_that_no_weights_need_are_refused_wherever_they_stand(code):
    forbidden = ("builtins.bytearray", "os.system")
    for name in forbidden:
        module, _, attribute = name.encode().rpartition(b".")
        data = b"N" * 9 + code + module + b"\n" + attribute + b"\n."
        assert check_pickle(data) == len(data) == check_pickle(data, forbidden=["builtins", "bytearray", "os"])
        with pytest.raises(PickleError) as caught:
            check_pickle(data, forbidden=forbidden)
        assert str(caught.value) == f"it refers to {name}, which no weights need."
    assert check_pickle(b"cbuiltins\nset\n.", forbidden=forbidden) == 15
    with pytest.raises(PickleError, match=r"^it is cut off\.$"):
        check_pickle(b"cos\nsystem")


def test_bytes_that_are_no_opcode_are_named_by_their_place():
    with pytest.raises(PickleError, match=r"^byte 4 is no opcode of a pickle\.$"):
        check_pickle(b"xyNN\x00.", 2)
    with pytest.raises(PickleError, match=r"^it names memo entry b'x\\n' after 0 opcodes\.$"):
        check_pickle(b"gx\n.")
    assert check_pickle(b"q\xff.") == 3 == check_pickle(b"h\xff."), "indices of one byte are never too large"
