"""Compiling the CPU kernels: what is tried, kept and said."""

from __future__ import annotations

import ctypes
import logging
import os
import pathlib
import re
import shlex
import stat
import subprocess
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from tinygptv.kernels import host_library
from tinygptv.kernels.host_library import compiled_library, find_compiler, processor_options
from tinygptv.kernels.host_structs import Attention, Layer, Matrix, Norm, Sum

HAS_COMPILER = host_library.host_library() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs x86 with AVX2 and a C compiler")


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Compilers that are run; they write what they are called with."""
    ran = []

    def run(command, **_):
        ran.append(command)
        with pathlib.Path(command[command.index("-o") + 1]).open("w") as file:
            file.write(" ".join(command))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(host_library, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setenv("CC", "env -i")
    return ran


def test_a_library_is_compiled_once_per_processor_and_sources(commands, tmp_path, monkeypatch):
    library = compiled_library(("-mavx2",))
    assert library.parent == tmp_path / "cache" and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert [path.name for path in library.parent.iterdir()] == [library.name], "no parts are left"
    assert re.fullmatch(r"host-[0-9a-f]{16}\.so", library.name)
    (command,) = commands
    assert [Path(part).name for part in command if part.endswith(".c")] == list(host_library.SOURCES)
    assert {"-O3", "-mavx2", "-shared"} <= set(command) and command[1] == "-i"
    assert compiled_library(("-mavx2",)) == library and len(commands) == 1
    other = compiled_library(("-mfma",))
    assert other != library and other.is_file() and library.is_file()
    monkeypatch.setattr(host_library, "OPTIONS", ("-O2",))
    assert compiled_library(("-mavx2",)) != library


def test_the_cache_lies_in_the_users_home(commands, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(host_library, "CACHE_DIR", Path("~/kernels"))
    assert compiled_library(()).parent == tmp_path / "kernels"


def test_where_the_cache_cannot_be_written_the_library_is_the_processs_own(commands, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    first, second = compiled_library(()), compiled_library(())
    assert first != second and first.is_file() and tmp_path not in first.parents
    assert len(caplog.messages) == 2 and caplog.messages[0].startswith(
        f"compiled kernels cannot be kept in {tmp_path}/cache ("
    )


@pytest.mark.parametrize("loads", [True, False])
def test_a_library_of_one_process_is_removed_once_it_is_loaded(commands, tmp_path, monkeypatch, loads):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(host_library, "processor_options", lambda: ("-mavx2",))

    def load(path):
        assert Path(path).is_file()
        if not loads:
            raise OSError("failed to map segment from shared object")
        return SimpleNamespace()

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert (host_library._load.__wrapped__() is not None) == loads
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no"))
    assert host_library._load.__wrapped__() is None
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_compilers_are_looked_for_by_name(monkeypatch):
    monkeypatch.setenv("CC", "ccache gcc")
    monkeypatch.setattr(host_library.shutil, "which", {"ccache": "/bin/ccache"}.get)
    assert find_compiler() == ("/bin/ccache", "gcc")
    monkeypatch.delenv("CC")
    monkeypatch.setattr(host_library.shutil, "which", {"clang": "/bin/clang", "gcc": "/bin/gcc"}.get)
    assert find_compiler() == ("/bin/gcc",)
    monkeypatch.setattr(host_library.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no C compiler found \(cc, gcc, clang\); install gcc"):
        find_compiler()


WIDE = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma")


@pytest.mark.parametrize(
    ("supported", "options"),
    [
        (("avx512", "vnni", "avx2"), WIDE),
        (("avx512", "vnni", "avx512_bf16", "avx2"), (*WIDE, "-mavx512bf16")),
        (("avx512", "avx512_bf16", "avx2"), ("-mavx2", "-mfma")),
        (("vnni", "avx2"), ("-mavx2", "-mfma")),
        (("vnni",), ()),
    ],
)
def test_options_are_those_of_the_processor(monkeypatch, supported, options):
    for name in ("avx512", "vnni", "avx2", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda value=name in supported: value)
    assert processor_options() == options


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """The folder of the C files, with a line in each."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in (*host_library.SOURCES, *host_library.HEADERS):
        (folder / name).write_text(f"// {name}")
    monkeypatch.setattr(host_library, "FOLDER", folder)
    return folder


def test_whatever_makes_another_library_is_in_its_name(commands, sources, monkeypatch):
    made = [compiled_library(("-mavx2",))]
    for name in (host_library.SOURCES[-1], host_library.HEADERS[0], host_library.HEADERS[-1]):
        (sources / name).write_text("changed")
        made.append(compiled_library(("-mavx2",)))
    monkeypatch.setenv("CC", "env -u X")
    made.append(compiled_library(("-mavx2",)))
    assert len(set(made)) == len(commands) == 5 and all(path.is_file() for path in made)
    (sources / host_library.SOURCES[-1]).write_text(f"// {host_library.SOURCES[-1]}")
    assert compiled_library(("-mavx2",)) not in made


def test_all_c_files_of_the_folder_are_compiled_and_in_the_name():
    names = {path.name for path in host_library.FOLDER.iterdir() if path.suffix in (".c", ".h")}
    assert names == {*host_library.SOURCES, *host_library.HEADERS}


def test_a_compiler_that_fails_leaves_nothing_and_its_last_words_are_told(commands, sources, monkeypatch, tmp_path):
    asked = {}

    def run(command, **options):
        asked.update(options, command=command)
        return subprocess.CompletedProcess(command, 1, "", "first " + "x" * 600 + " the last words\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError) as caught:
        compiled_library(("-mavx2",))
    command = asked["command"]
    assert str(caught.value).startswith(f"{shlex.join(command)} failed: xxx")
    assert str(caught.value).endswith("x the last words") and "first" not in str(caught.value)
    assert (asked["timeout"], asked["capture_output"], asked["text"]) == (120, True, True)
    assert command[1:7] == ["-i", "-O3", "-std=c11", "-pthread", "-fPIC", "-shared"] and command[7] == "-mavx2"
    assert command[8:-3] == [str(sources / name) for name in host_library.SOURCES]
    assert command[-3] == "-o" and command[-1] == "-lm"
    assert list((tmp_path / "cache").iterdir()) == []


def test_functions_that_a_processor_lacks_are_left_out():
    library = SimpleNamespace(gelu_rows=SimpleNamespace(), multiply_rows=SimpleNamespace())
    assert host_library._declare(library) is library
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    assert library.gelu_rows.argtypes == [pointer, size, size, number]
    assert library.multiply_rows.argtypes == [pointer, pointer, pointer, size, number]


def test_arguments_are_those_of_the_c_functions():
    kinds = {"float": ctypes.c_float, "int": ctypes.c_int, "int64_t": ctypes.c_int64}
    code = "".join((host_library.FOLDER / name).read_text() for name in host_library.SOURCES)
    for name, arguments in host_library.SIGNATURES.items():
        (written,) = re.findall(rf"^(?:void|int) {name}\(([^)]*)\) {{", code, re.MULTILINE)
        found = [ctypes.c_void_p if "*" in each else kinds[each.split()[0]] for each in written.split(",")]
        assert arguments == found, name


def test_structures_are_those_of_the_c_files():
    code = "".join((host_library.FOLDER / name).read_text() for name in (*host_library.HEADERS, *host_library.SOURCES))
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)
    kinds = {"float": ctypes.c_float, "int": ctypes.c_int, "int64_t": ctypes.c_int64}
    for structure in (Matrix, Attention, Sum, Norm, Layer):
        found = []
        body = re.findall(rf"typedef struct {{([^}}]*)}} {structure.__name__};", code)[0]
        for line in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(?:const )?(\w+) (.*)", line, re.DOTALL).groups()
            for name in map(str.strip, names.split(",")):
                found.append((name.strip("*"), ctypes.c_void_p if name.startswith("*") else kinds[kind]))
        assert structure._fields_ == found
        kinds[structure.__name__] = structure


def test_threads_that_arrive_together_wait_for_one_library(monkeypatch):
    monkeypatch.setattr(host_library, "_load", host_library._lock.locked)
    assert host_library.host_library() is True and not host_library._lock.locked()


@pytest.mark.parametrize("reason", ["no compiler", "fails", "takes too long", "cannot be loaded"])
def test_without_a_library_torch_does_it_and_the_log_says_why(monkeypatch, caplog, commands, reason):
    monkeypatch.delenv(host_library.SWITCH, raising=False)
    monkeypatch.setattr(host_library, "processor_options", lambda: ("-mavx2",))
    if reason == "no compiler":
        monkeypatch.setattr(host_library.shutil, "which", lambda name: None)
    elif reason == "fails":
        monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "no such option"))
    elif reason == "takes too long":
        monkeypatch.setattr(subprocess, "run", Mock(side_effect=subprocess.TimeoutExpired("cc", 120)))
    with caplog.at_level(logging.WARNING):
        assert host_library._load.__wrapped__() is None
    said = {
        "no compiler": "no C compiler found",
        "fails": "no such option",
        "takes too long": "timed out after 120 seconds",
        "cannot be loaded": "invalid ELF header",
    }
    assert "torch's kernels, which are slower" in caplog.text and said[reason] in caplog.text


@pytest.mark.parametrize("switch", ["off", "OFF"])
def test_the_switch_keeps_torchs_kernels_without_a_word(monkeypatch, caplog, switch):
    monkeypatch.setenv(host_library.SWITCH, switch)
    assert host_library._load.__wrapped__() is None and not caplog.text


@needs_compiler
def test_items_are_done_once_each_by_the_threads_that_are_there():
    library = host_library.host_library()
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    done = []
    share = library.share_items
    share.argtypes = [kind, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    for count, threads in ((0, 2), (1, 2), (7, 1), (100, 3), (3, 8), (5, 2), (1000, 4)):
        share(kind(lambda _, item: done.append(item)), None, count, threads)
        assert sorted(done) == list(range(count))
        done.clear()
    # Items that share items themselves are callers at the same time. The second has threads, a third none.
    both = threading.Barrier(2)
    together = kind(lambda _, item: both.wait(timeout=60))
    share(kind(lambda _, item: None if item else share(together, None, 2, 2)), None, 2, 2)
    assert not both.broken
    share(kind(lambda _, item: share(kind(lambda _, inner: done.append((item, inner))), None, 3, 2)), None, 5, 2)
    assert sorted(done) == [(item, inner) for item in range(5) for inner in range(3)]


@needs_compiler
def test_a_forked_process_has_threads_of_its_own():
    """A fork takes along what the pool knows of its threads, but no thread except its caller's."""
    share = host_library.host_library().share_items
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    share.argtypes = [kind, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    both = threading.Barrier(2)
    together = kind(lambda _, item: both.wait(timeout=60))  # only two threads at once get past it
    within = kind(lambda _, item: None if item else share(together, None, 2, 2))
    share(together, None, 2, 2)
    share(within, None, 2, 2)
    child = os.fork()
    if not child:
        share(together, None, 2, 2)
        share(within, None, 2, 2)
        os._exit(both.broken)
    assert os.waitpid(child, 0)[1] == 0


@needs_compiler
def test_a_process_that_is_forked_within_a_loop_takes_none_of_its_items():
    share = host_library.host_library().share_items
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    share.argtypes = [kind, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    parent, begun, forked = os.getpid(), threading.Event(), threading.Event()
    items = []

    def of_parent(_, item):
        items.append(-1)
        begun.set()
        if os.getpid() == parent:
            forked.wait(timeout=60)

    loop = kind(of_parent)
    caller = threading.Thread(target=share, args=(loop, None, 200, 2))
    caller.start()
    begun.wait(timeout=60)
    child = os.fork()
    if not child:
        items.clear()
        share(kind(lambda _, item: items.append(item)), None, 200, 64)
        os._exit(sorted(items) != list(range(200)))
    forked.set()
    caller.join()
    assert os.waitpid(child, 0)[1] == 0
