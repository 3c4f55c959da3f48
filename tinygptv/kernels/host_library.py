"""Compiles the kernels for CPUs, C files of this folder, for the processor at hand and loads them.

A wheel of this project has no compiled code. A C compiler makes these kernels in two seconds, once per version and type
of processor; the results stay in ``~/.cache/tinygptv/kernels``. Where there is no compiler, or the processor has none
of the instructions that the files are written for, callers keep torch's kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tinygptv.folder_fault import folder_fault

SWITCH = "TINYGPTV_HOST_KERNELS"
"""Environment variable: ``off`` keeps torch's kernels."""

CACHE_DIR = Path("~/.cache/tinygptv/kernels")
FOLDER = Path(__file__).parent
SOURCES = ("host_attention.c", "host_encoder.c", "host_linear.c", "host_step.c", "host_threads.c")
HEADERS = ("host_attention.h", "host_linear.h", "host_threads.h", "host_vectors.h")
COMPILERS = ("cc", "gcc", "clang")
"""Tried in this order, after the one that the environment variable ``CC`` names."""
OPTIONS = ("-O3", "-std=c11", "-pthread", "-fPIC", "-shared")
COMPILE_SECONDS = 120
BLOCK = 16
"""Widths of rows, of heads (but the image encoder's) and of matrices are multiples of it."""

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "multiply_rows": [*[_POINTER] * 3, _SIZE, _INT],
    "multiply_rounded": [*[_POINTER] * 5, _SIZE, _INT],
    "run_layers": [_POINTER, _SIZE, *[_POINTER] * 3, _SIZE, _SIZE, _INT],
    "attend_tokens": [_POINTER, _SIZE, _SIZE, _INT],
    "add_branches": [_POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _INT],
    "norm_rows": [*[_POINTER] * 3, _FLOAT, _SIZE, _SIZE, _POINTER, _INT],
    "gelu_rows": [_POINTER, _SIZE, _SIZE, _INT],
    "encoder_rows": [*[_POINTER] * 3, _FLOAT, _INT, _POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "encoder_attention": [_POINTER, _POINTER, *[_SIZE] * 3, _INT],
}
"""Types of the arguments of the C functions."""

logger = logging.getLogger(__name__)
_lock = threading.Lock()


def host_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where torch's have to do; the log tells once why."""
    with _lock:  # several threads pack weights, and the first ones arrive together
        return _load()


def loaded_library() -> ctypes.CDLL:
    """The compiled kernels, for callers that know that they are there (``has_host_linear`` and its like)."""
    library = host_library()
    assert library is not None, "nobody asked whether this machine has the kernels"
    return library


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie; None is C's NULL."""
    return None if tensor is None else tensor.data_ptr()


@cache
def _load() -> ctypes.CDLL | None:
    processor = processor_options()
    if not processor or os.environ.get(SWITCH, "").lower() == "off":
        return None
    path = None
    try:
        path = compiled_library(processor)
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("low-bit products on this CPU use torch's kernels, which are slower: %s", error)
        return None
    finally:
        if path and path.parent != CACHE_DIR.expanduser():
            shutil.rmtree(path.parent, ignore_errors=True)  # of this process alone; what is loaded stays


def processor_options() -> tuple[str, ...]:
    """The compiler's options for this processor's instructions; empty where the kernels need others."""
    if torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported():
        half = ("-mavx512bf16",) if torch.cpu._is_avx512_bf16_supported() else ()
        return ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma", *half)
    return ("-mavx2", "-mfma") if torch.cpu._is_avx2_supported() else ()


def compiled_library(processor: tuple[str, ...]) -> Path:
    """Path of the shared library, compiled where that was not done before.

    Args:
        processor: options for the instructions that may be used.

    Raises:
        OSError: no compiler, or no folder that can be written.
        RuntimeError: the compiler failed.
    """
    compiler = find_compiler()
    files = [(FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    inputs = (compiler, OPTIONS, processor, files)
    name = f"host-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.so"
    folder = CACHE_DIR.expanduser()
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        work = Path(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        logger.warning(
            "compiled kernels cannot be kept in %s (%s): each process compiles its own",
            folder,
            folder_fault(folder, error),
        )
        folder = work = Path(tempfile.mkdtemp(prefix="tinygptv-kernels-"))
    try:
        _compile(compiler, [*OPTIONS, *processor], work / name)
        (work / name).replace(folder / name)  # processes that start together see all of it or nothing
    finally:
        if work != folder or not (work / name).is_file():
            shutil.rmtree(work, ignore_errors=True)
    return folder / name


def find_compiler() -> tuple[str, ...]:
    """Command of a C compiler; raises ``FileNotFoundError``."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in ([named] if named else []) + [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return (found, *command[1:])
    raise FileNotFoundError(f"no C compiler found ({', '.join(COMPILERS)}); install gcc, or name one in CC.")


def _compile(compiler: tuple[str, ...], options: list[str], library: Path) -> None:
    command = [*compiler, *options, *(str(FOLDER / source) for source in SOURCES), "-o", str(library), "-lm"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """State the types of arguments: ctypes would pass 32 bits of an address and doubles for floats."""
    for name, arguments in SIGNATURES.items():
        if hasattr(library, name):  # some need instructions that not every processor has
            getattr(library, name).argtypes = arguments
    return library
