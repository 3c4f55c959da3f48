"""A folder that cannot be made is one sentence, wherever it is made: what is in the way, and what to do."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.settings import MiniatureSettings, SettingsError
from pipelines.storage import WorkFolder, secure_folder
from tinygptv import hub
from tinygptv.checkpoint.folders import CheckpointError, write_folder
from tinygptv.folder_fault import folder_fault
from tinygptv.kernels import host_library
from tinygptv.training import compilation


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_text("mine")
    yield tmp_path / "file"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("below", ["", "/below", "/far/below"])
def test_a_file_in_the_way_is_named(file, below):
    with pytest.raises(OSError) as caught:
        Path(f"{file}{below}").mkdir(parents=True, exist_ok=True)
    assert folder_fault(Path(f"{file}{below}"), caught.value) == f"{file} is a file"


def test_other_faults_are_named_for_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    for path, number, told in (
        ("link", errno.EEXIST, f"{tmp_path}/link is a link to nothing"),
        ("new/one", errno.EACCES, f"{tmp_path} is read-only for you"),
        ("new/one", errno.EROFS, f"{tmp_path} is read-only for you"),
        ("new", errno.ENOSPC, "No space left on device"),
        ("folder", errno.EEXIST, "File exists"),
    ):
        assert folder_fault(tmp_path / path, OSError(number, errno_text(number))) == told
    assert folder_fault(tmp_path, OSError("odd")) == "odd"


def errno_text(number):
    return {errno.ENOSPC: "No space left on device", errno.EEXIST: "File exists"}.get(number, "no")


MAKERS = {
    "cache": (
        secure_folder,
        SettingsError,
        "the cache {} cannot be made: {} is a file. Set TINYGPTV_CACHE to a folder",
    ),
    "storage": (
        lambda path: storage.make_folder(str(path)),
        SettingsError,
        "folder {} cannot be made: {} is a file. M",
    ),
    "work": (lambda path: WorkFolder(str(path)), SettingsError, "folder {} cannot be made: {} is a file. Move away"),
    "download": (
        lambda path: storage.download_files("memory://x", [], path),
        SettingsError,
        "folder {} cannot be made: {}",
    ),
    "output": (
        lambda path: MiniatureSettings(output=str(path)).output_dir(""),
        SettingsError,
        "output={} cannot be a folder: {} is a file. Give another output=.",
    ),
    "checkpoint": (
        lambda path: write_folder(path / "x", lambda staging: None),
        CheckpointError,
        "output {}/x cannot be made: {} is a file. Give another folder.",
    ),
}


@pytest.mark.parametrize("below", ["", "/below"])
@pytest.mark.parametrize("maker", MAKERS)
def test_no_folder_is_made_over_a_file(file, maker, below):
    make, error, told = MAKERS[maker]
    path = Path(f"{file}{below}")
    with pytest.raises(error, match="^" + re.escape(told.format(path, file))):
        make(path)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("number", "told"), [(errno.EACCES, "is read-only for you"), (errno.ENOSPC, "No space left")])
def test_a_disk_that_refuses_is_one_sentence(tmp_path, monkeypatch, maker, number, told):
    def fail(path, **how):
        raise OSError(number, errno_text(number), str(path))

    make, error, _ = MAKERS[maker]
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(error, match=rf"{tmp_path}/new.* cannot be made: .*{told}.*\. (Give|Set|Move)"):
        make(tmp_path / "new")


def test_kernels_are_compiled_without_a_folder_to_keep_them(file, monkeypatch, caplog):
    monkeypatch.setattr(host_library, "CACHE_DIR", file / "kernels")
    monkeypatch.setattr(host_library, "find_compiler", lambda: ("cc",))
    monkeypatch.setattr(host_library, "_compile", lambda compiler, options, target: target.touch())
    library = host_library.compiled_library(())
    assert library.is_file() and library.parent.name.startswith("tinygptv-kernels-")
    assert f"compiled kernels cannot be kept in {file}/kernels ({file} is a file)" in caplog.text
    library.unlink()
    library.parent.rmdir()


def test_layers_are_compiled_without_a_folder_to_keep_them(file, monkeypatch, caplog):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(compilation, "CACHE_DIR", file / "layers")
    compilation.keep_compiled_layers()
    assert "TORCHINDUCTOR_CACHE_DIR" not in compilation.os.environ
    assert f"compiled layers cannot be kept in {file}/layers ({file} is a file)" in caplog.text


@pytest.mark.parametrize(
    ("output", "fix"), [(None, "Set HF_HOME to another folder."), ("out", "Give another --output.")]
)
def test_the_hubs_cache_is_named_where_it_is_a_file(file, monkeypatch, output, fix):
    import huggingface_hub

    def download(*given, **named):
        (file / "models").mkdir(parents=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    told = f"hf://a/b cannot be downloaded: {file}/models cannot be made: {file} is a file. {fix}"
    with pytest.raises(CheckpointError, match=re.escape(told)):
        hub.local_folder("hf://a/b", output)
