"""Memory that loading freed goes back to the system, where the C library is glibc."""

from __future__ import annotations

import ctypes

import pytest

from tinygptv.quantization import host_memory
from tinygptv.quantization.host_memory import returning_memory


class Library:
    """A C library that notes what it was told."""

    def __init__(self):
        self.told = []

    def mallopt(self, name, value):
        self.told.append((name, value))

    def malloc_trim(self, pad):
        self.told.append(("trim", pad))


@pytest.mark.parametrize("fails", [False, True])
def test_large_blocks_are_mappings_of_their_own_while_weights_are_loaded(monkeypatch, fails):
    library = Library()
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: library)
    try:
        with returning_memory():
            assert library.told == [(-3, 2**20)], "M_MMAP_THRESHOLD of malloc.h"
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert library.told[1:] == [(-3, 2**25), (-1, 2**26), ("trim", 0)]


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_with_other_libraries_nothing_is_done(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(host_memory.ctypes, "CDLL", fail)
    with returning_memory():
        pass
    for name in ("mallopt", "malloc_trim"):
        library = type("Musl", (), {name: lambda *a: pytest.fail("called")})()
        monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _, library=library: library)
        with returning_memory():
            pass


def test_the_systems_own_library_is_found():
    library = host_memory._glibc()
    assert library is None or isinstance(library, ctypes.CDLL)
