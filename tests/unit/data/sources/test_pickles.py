"""Pickles that claim more than they hold."""

from __future__ import annotations

import pickle
import resource

import pytest

from pipelines.data.sources import pickles
from pipelines.data.sources.pickles import UnsafePickleError, load_plain_pickle

pytestmark = pytest.mark.security


@pytest.mark.parametrize(
    "data",
    [
        b"]r\xff\xff\xff\xff.",  # seven bytes: a memo of four thousand million places
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"(lp4294967295\n.",
        b"]p" + b"9" * 400 + b"\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",  # BINBYTES8
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",  # BYTEARRAY8
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # BINUNICODE8
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # FRAME
        b"\x8b\xff\xff\xff\x7f.",  # LONG4
        b"T\xff\xff\xff\x7f.",  # BINSTRING
        b"]q\x00",  # no end
        b"\x80\x02\xff.",  # no opcode
        b"S'cut off",
    ],
)
def test_claims_of_size_are_refused_before_anything_is_built(data, monkeypatch):
    monkeypatch.setattr(pickles, "_PlainUnpickler", lambda *_, **__: pytest.fail("it is unpickled"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="not a readable pickle"):
        load_plain_pickle(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"P1\n.", "it refers to objects outside of itself"),
        (b"\x80\x02K\x01Q.", "it refers to objects outside of itself"),
        (b"cos\nsystem\n.", "it asks for os.system; only lists, dicts, strings and numbers are accepted"),
    ],
)
def test_objects_and_names_outside_of_the_file_are_refused(data, told):
    with pytest.raises(UnsafePickleError) as refused:
        load_plain_pickle(data)
    assert str(refused.value) == told


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_large_plain_pickles_are_read(protocol):
    value = [{"n": n, "text": f"word {n}" * 40, "box": [n, n + 0.5]} for n in range(2000)]
    assert load_plain_pickle(pickle.dumps(value, protocol)) == value
    large = [b"x" * 70_000 if protocol > 2 else "x", "y" * 70_000, 1 << 5000]
    assert load_plain_pickle(pickle.dumps(large, protocol)) == large
