"""What a fetch looks at, tells, downloads and records, step by step, without a server."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from pipelines.fetch import addresses
from pipelines.fetch import run as module
from pipelines.fetch.http import DownloadError, Remote, Retries, Stated, TryAgainError, refuse_bad_answer
from pipelines.fetch.results import LOCK_FILE
from pipelines.fetch.run import Wanted, _Fetch
from pipelines.json_files import write_json
from pipelines.settings import FetchSettings, SettingsError
from tinygptv.convert.sources import SourceFile

FILE = SourceFile(path="phi/a.bin", name="a.bin", base="https://h/m/", license="MIT")
URL = "https://h/m/a.bin"
CLIENT = SimpleNamespace()
NO_RETRIES = Retries(most=1)


def job(folder, **settings):
    return _Fetch(FetchSettings(**{"quiet": True, **settings}), folder, CLIENT, NO_RETRIES)


@pytest.fixture
def here(tmp_path):
    (tmp_path / "phi").mkdir()
    (tmp_path / "phi/a.bin").write_bytes(b"12345")
    return tmp_path


def test_what_is_recorded_and_unchanged_is_not_looked_at_again(here, monkeypatch):
    checked = []
    monkeypatch.setattr(module, "check_file", lambda path, remote: checked.append((path, remote)) or "sha")
    target = here / "phi/a.bin"
    assert job(here)._look(FILE) == Wanted(FILE, target, Remote(URL), True) and checked == [(target, Remote(URL))]
    recorded = Remote(URL, 5, "sha", stated_by=f"{LOCK_FILE} (the first download)")
    assert job(here)._look(FILE) == Wanted(FILE, target, recorded, True)
    entry = json.loads((here / LOCK_FILE).read_text())["files"]["phi/a.bin"]
    assert entry == {
        "bytes": 5,
        "sha256": "sha",
        "modified_ns": (here / "phi/a.bin").stat().st_mtime_ns,
        "address": "https://h/m/a.bin",
        "revision": "",
        "license": "MIT",
    }
    for settings, times in (({}, 1), ({"verify": True}, 2), ({"accept_changed": True}, 2)):
        again = job(here, **settings)._look(FILE)
        assert (again.is_here, again.target, len(checked)) == (True, here / "phi/a.bin", times)
    assert job(here)._look(replace(FILE, sha256="sha")).is_here and len(checked) == 2
    assert job(here, accept_changed=True)._look(replace(FILE, sha256="other")).is_here and len(checked) == 2
    job(here)._look(replace(FILE, sha256="other"))
    assert len(checked) == 3, "the publisher states another hash than the recorded one"
    changed_ns = (here / "phi/a.bin").stat().st_mtime_ns
    (here / "phi/a.bin").write_bytes(b"123456")
    os.utime(here / "phi/a.bin", ns=(changed_ns, changed_ns))
    job(here)._look(FILE)
    assert len(checked) == 4, "it has another size"
    os.utime(here / "phi/a.bin", ns=(changed_ns, changed_ns + 1))
    job(here)._look(FILE)
    assert len(checked) == 5, "it was changed later"


def test_what_lies_elsewhere_is_tried_in_turn_and_then_the_server_is_asked(tmp_path, monkeypatch):
    tried, places, target = [], [Path("x"), Path("y"), Path("z")], tmp_path / "phi/a.bin"

    def take(self, *given):
        tried.append(given)
        return given[1].name == takes

    def ask(self, file, remote):
        assert (file, remote) == (FILE, Remote(URL))
        return replace(remote, num_bytes=3)

    monkeypatch.setattr(_Fetch, "_elsewhere", lambda self, file: iter(places))
    monkeypatch.setattr(_Fetch, "_take", take)
    monkeypatch.setattr(_Fetch, "_asked", ask)
    takes = "y"
    assert job(tmp_path)._look(FILE) == Wanted(FILE, target, Remote(URL), True)
    assert tried == [(FILE, place, target, Remote(URL)) for place in places[:2]]
    takes = "none"
    assert job(tmp_path)._look(FILE) == Wanted(FILE, target, Remote(URL, 3), False) and len(tried) == 5


def test_hashes_come_from_the_publisher_or_the_first_download(here, monkeypatch):
    write_json(here / LOCK_FILE, {"files": {"phi/a.bin": {"bytes": 7, "sha256": "known"}}})
    stated = replace(FILE, sha256="stated", num_bytes=9, stated_by="the paper")
    for file, expected in (
        (stated, (9, "stated", "the paper")),
        (replace(stated, stated_by=""), (9, "stated", "its publisher")),
        (FILE, (7, "known", f"{LOCK_FILE} (the first download)")),
        (replace(FILE, path="other"), (0, "", "its publisher")),
    ):
        for settings in ({}, {"verify": True}, {"offline": True}):
            remote = job(here, **settings)._remote(file)
            assert (remote.num_bytes, remote.sha256, remote.stated_by) == expected
    remote = job(here, accept_changed=True)._remote(stated)
    assert (remote.num_bytes, remote.sha256, remote.url) == (0, "", URL)
    monkeypatch.setattr(module, "address", lambda file, settings: ("u", {"Authorization": "Bearer t"}))
    assert job(here)._remote(FILE).headers == {"Authorization": "Bearer t"}


def test_a_server_adds_what_is_stated_nowhere(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "ask", lambda *given: asked.append(given) or Stated(5, "theirs", "git"))
    for remote, expected in (
        (Remote("u"), (5, "theirs", "git")),
        (Remote("u", 9), (9, "theirs", "git")),
        (Remote("u", 9, "mine"), (9, "mine", "git")),
    ):
        found = job(tmp_path)._asked(FILE, remote)
        assert (found.num_bytes, found.sha256, found.git_sha1) == expected
        assert asked[-1] == (CLIENT, remote, "phi/a.bin", NO_RETRIES)

    def refusing(*given):
        raise DownloadError("no")

    monkeypatch.setattr(module, "ask", refusing)
    assert job(tmp_path, dry_run=True)._asked(FILE, Remote("u")) == Remote("u")
    with pytest.raises(DownloadError):
        job(tmp_path)._asked(FILE, Remote("u"))
    assert not job(tmp_path, offline=True)._look(FILE).is_here, "nothing is asked"
    for known in ({"num_bytes": 9}, {"sha256": "s"}):
        with pytest.raises(DownloadError):
            job(tmp_path)._look(replace(FILE, **known))
    assert not job(tmp_path)._look(replace(FILE, num_bytes=9, sha256="s")).is_here, "all is known"


def test_files_elsewhere_are_looked_for_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("usb/phi/a.bin", "usb/a.bin", "phi/a.bin", "flat/b.bin", "x/phi/phi/a.bin", "x/phi/a.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(file, *local):
        return [path.relative_to(tmp_path).as_posix() for path in job(tmp_path / "out", local=local)._elsewhere(file)]

    assert found(FILE, "~/usb") == ["usb/phi/a.bin"], "a file of a folder is not taken by its name alone"
    assert found(FILE, str(tmp_path / "phi")) == ["phi/a.bin"], "the folder itself is named"
    assert found(FILE, "~/x/phi") == ["x/phi/phi/a.bin", "x/phi/a.bin"], "its own path comes first"
    (tmp_path / "folders/phi/a.bin").mkdir(parents=True)
    assert found(FILE, "~/folders") == [], "a folder is no file"
    assert found(replace(FILE, path="b.bin", name="b.bin"), "~/usb", "~/flat") == ["flat/b.bin", "flat/b.bin"]
    with pytest.raises(SettingsError, match="local=/nowhere is no folder"):
        found(FILE, "/nowhere")


def test_the_hubs_cache_is_asked_for_the_very_revision(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    cached = {"a.bin": str(tmp_path / "x"), "b.bin": None}
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda *given, **more: asked.append((given, more)) or cached[given[1]],
    )
    (tmp_path / "snapshot").symlink_to(tmp_path / "x")
    cached["a.bin"] = str(tmp_path / "snapshot")
    file = replace(FILE, repo="org/phi", kind="model", revision="r1")
    assert list(job(tmp_path)._elsewhere(file)) == [tmp_path / "x"]
    assert list(job(tmp_path, offline=True)._elsewhere(file)) == [tmp_path / "x"]
    assert list(job(tmp_path)._elsewhere(replace(file, name="b.bin"))) == []
    assert asked[0] == (("org/phi", "a.bin"), {"revision": "r1", "repo_type": "model"})


def test_what_is_taken_is_recorded_with_its_hash(tmp_path, here, monkeypatch, caplog):
    monkeypatch.setattr(module, "check_file", lambda path, remote: {"u": "sha"}[remote.url])
    out = tmp_path / "out"
    out.mkdir()
    taking = job(out)
    assert taking._take(FILE, here / "phi/a.bin", out / "deep/er/a.bin", Remote("u"))
    assert (out / "deep/er/a.bin").read_bytes() == b"12345" and taking.lock["phi/a.bin"]["sha256"] == "sha"

    def no_links(path, other):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    os.utime(here / "phi/a.bin", ns=(1, 1))
    assert taking._take(FILE, here / "phi/a.bin", out / "copy", Remote("u"))
    assert taking.lock["phi/a.bin"]["modified_ns"] == (out / "copy").stat().st_mtime_ns, "of the copy"

    def refusing(path, remote):
        assert remote == Remote("u")
        raise DownloadError(f"{path.name} is another file.")

    monkeypatch.setattr(module, "check_file", refusing)
    assert not taking._take(FILE, here / "phi/a.bin", out / "b", Remote("u")) and not (out / "b").exists()
    assert caplog.messages == ["not taken: a.bin is another file."]
    with pytest.raises(
        DownloadError, match=r"^a\.bin is another file\. Remove it to download it again; accept_changed="
    ):
        taking._checked(here / "phi/a.bin", Remote("u"))


def test_what_is_here_and_what_is_left_is_told(tmp_path, capsys):
    def wanted(name, num_bytes, is_here=False):
        return Wanted(replace(FILE, path=name), tmp_path / name, Remote(f"https://me:pw@h/{name}", num_bytes), is_here)

    files = [wanted("a", 50_000_000), wanted("b", 4_999_999), wanted("c", 0), wanted("d", 9, True), wanted("e", 4)]
    (tmp_path / ".e.part").write_bytes(b"1234")
    with (tmp_path / ".a.part").open("wb") as part:
        part.truncate(40_000_001)  # nothing is written
    telling = _Fetch(FetchSettings(), tmp_path, None, NO_RETRIES)
    telling._tell(files)
    assert capsys.readouterr().out.splitlines() == [
        "  a: 0.01 GB, https://***@h/a",
        "  b: 5.000 MB, https://***@h/b",
        "  c: unknown size, https://***@h/c",
        "  d: here",
        "  e: 0.000 MB, https://***@h/e",
        f"1 of 5 files are in {tmp_path}; 0.01 GB to download, and 1 of unknown size.",
    ]
    published = Wanted(replace(FILE, num_bytes=7), tmp_path / "f", Remote("u"), False)
    assert (published.num_bytes, replace(published, remote=Remote("u", 9)).num_bytes) == (7, 9), "its server knows"
    assert [each.bytes_left for each in files] == [9_999_999, 4_999_999, 0, 0, 0]
    assert [module._gigabytes(size) for size in (5_000_000, 1_234_567_890)] == ["0.01 GB", "1.23 GB"]
    job(tmp_path)._tell(files)
    assert capsys.readouterr().out == ""


def test_only_new_bytes_are_counted_and_long_downloads_show_their_speed(tmp_path, monkeypatch):
    shown, bars, asked, now = [], [], [], [0.0]

    class Bar:
        def __init__(self, title, quiet):
            shown.append(title), bars.append(quiet)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        @property
        def seconds(self):
            return now[0]

        def update(self, *given):
            shown.append(given)

    def download(client, remote, target, report, retries):
        asked.append((client, remote, target, retries))
        target.write_bytes(b"x" * 402_000)
        for now[0], done, total in ((0.2, 1 << 20, 3 << 20), (0.5, 2 << 20, 3 << 20), (0.6, 3 << 20, 3 << 20)):
            report(done, total)
        now[0] = 2.0
        report(4 << 20, 0)  # of a size that its server does not say
        now[0] = 2.1
        report(5 << 20, 0)
        return "sha"

    monkeypatch.setattr(module, "Bar", Bar)
    monkeypatch.setattr(module, "download", download)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/.a.part").write_bytes(b"x" * 400_000)
    each = Wanted(FILE, tmp_path / "deep/a", Remote("u", 5_400_000), False)
    running = job(tmp_path, quiet=False)
    running._download(each)
    assert running.bytes_downloaded == 2_000 and running.lock["phi/a.bin"]["sha256"] == "sha"
    assert shown == ["phi/a.bin", (2, 3, "MiB  3.4 MB/s"), (3, 3, "MiB  4.6 MB/s"), (4, 4, "MiB  1.9 MB/s")]
    assert asked == [(CLIENT, each.remote, each.target, NO_RETRIES)]
    running._download(replace(each, target=tmp_path / "new/b", remote=Remote("u", 4_999_999)))
    assert bars == [False, True] and running.bytes_downloaded == 404_000
    job(tmp_path, quiet=True)._download(each)
    assert bars == [False, True, True]


def test_a_dry_run_only_looks(tmp_path, monkeypatch):
    done = []
    for name in ("_tell", "_check_disk", "_refuse_offline", "_download"):
        monkeypatch.setattr(_Fetch, name, lambda self, given, name=name: done.append((name, given)))
    (tmp_path / "a").write_bytes(b"123")
    files = {name: replace(FILE, path=name) for name in "ab"}
    looked = [Wanted(files[name], tmp_path / name, Remote(name, 9), name == "a") for name in files]
    monkeypatch.setattr(_Fetch, "_look", lambda self, file: looked["ab".index(file.path)])
    dry = job(tmp_path, dry_run=True)
    dry.lock = {"a": "entry", "z": "of another fetch"}
    assert dry.run(files.values()) == {"a": "entry"} and done == [("_tell", looked)]
    assert dry.num_bytes == 3 + 9
    job(tmp_path).run(files.values())
    of_all = [(name, looked) for name in ("_tell", "_check_disk", "_refuse_offline")]
    assert done[1:] == [*of_all, ("_download", looked[1])]


def test_a_fetch_of_sets_and_weights(tmp_path, monkeypatch, capsys):
    """Data goes to raw/, weights to weights/; the result has everything."""
    monkeypatch.chdir(tmp_path)
    told, asked, finished, missing = {}, [], [], []

    class Job:
        bytes_downloaded, num_bytes = 7, 9

        def __init__(self, settings, folder, client, retries):
            assert not client.is_closed
            told.update(folder=folder, most=retries.most)
            asked.append(settings)
            with pytest.raises(SettingsError, match=f"^another fetch is writing to {folder}: wait for it, or give"):
                module.fetch(settings)

        def run(self, files):
            told["files"] = files
            return {"a": "entry"}

    monkeypatch.setattr(module, "_Fetch", Job)
    monkeypatch.setattr(module, "named_files", lambda names: [f"file of {name}" for name in names])
    monkeypatch.setattr(module, "files_left", lambda each, folder: [f"file of {each.name}"])
    monkeypatch.setattr(module, "finish_sets", lambda *given: finished.append(given) or ["command"])
    monkeypatch.setattr(module, "missing_by_hand", lambda *given: missing.append(given) or ["by hand"] * bool(given[0]))
    settings, gqa = FetchSettings(what=["gqa", "stage1"]), module.all_sets()["gqa"]
    result = module.fetch(settings)
    assert (asked, finished) == ([settings], [([gqa], tmp_path / "raw", settings)])
    assert missing == [([gqa], tmp_path / "raw")]
    assert told == {"folder": tmp_path / "raw", "most": 6, "files": ["file of stage1", "file of gqa"]}
    assert (
        result
        == json.loads((tmp_path / "raw/result.json").read_text())
        == {
            "folder": f"{tmp_path}/raw",
            "files": {"a": "entry"},
            "bytes_downloaded": 7,
            "num_bytes": 9,
            "by_hand": ["by hand"],
            "commands": ["command"],
            "result": f"{tmp_path}/raw/result.json",
        }
    )
    out = capsys.readouterr().out
    assert out.startswith(f"{module.describe([gqa])}\n") and out.endswith("\nby hand\nThen run: command\n")
    result = module.fetch(FetchSettings(what=["stage1"], dry_run=True))
    assert (told["folder"], told["most"], told["files"]) == (tmp_path / "weights", 1, ["file of stage1"])
    assert result["commands"] == [] and capsys.readouterr().out == ""
    module.fetch(FetchSettings(what=["data1", "stage2"], quiet=True), Retries(most=3))
    assert told["files"] == ["file of stage2", "file of laion", "file of cc_sbu"] and told["most"] == 3
    sampled = []
    with monkeypatch.context() as patched:
        patched.setattr(
            module, "fetch_samples", lambda settings, retries: sampled.append((settings.what, retries.most))
        )
        for given in (None, Retries(most=2)):
            module.fetch(FetchSettings(what=["gqa", "sample"]), given)
    assert sampled == [(["gqa", "sample"], 6), (["gqa", "sample"], 2)]
    module.fetch(FetchSettings(what=["gqa"], quiet=True))
    assert told["files"] == ["file of gqa"] and "licence" not in capsys.readouterr().out
    (tmp_path / "raw/sample.json").touch()
    with pytest.raises(
        SettingsError, match=f"^{tmp_path}/raw holds samples of data sets: give another output= for whole"
    ):
        module.fetch(FetchSettings(what=["gqa"]))


def test_addresses_and_who_asks(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    file = replace(FILE, repo="org/x", kind="dataset", revision="r")
    url, headers = addresses.address(file, FetchSettings(hub="https://hub.example/"))
    assert (url, headers) == ("https://hub.example/datasets/org/x/resolve/r/a.bin", {})
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    assert addresses.address(file, FetchSettings())[1] == {"Authorization": "Bearer t"}
    with addresses.open_client() as client:
        assert client.headers["User-Agent"] == "tinygptv-fetch" and client.timeout == httpx.Timeout(30.0, read=60.0)


REFUSALS = [
    (
        403,
        {},
        "refuses access (HTTP 403): accept its terms in a browser and set HF_TOKEN where it is a file of the hub, or "
        "get a.bin by other means and name its folder with local=.",
    ),
    (
        404,
        {},
        "does not give the file (HTTP 404 Not Found): check the address or the mirror, or get a.bin by other means and "
        "name its folder with local=.",
    ),
    (
        200,
        {"Content-Type": " text/html ;x"},
        "answers with a web page of https://h, not with a.bin: a login, a consent or a proxy is in the way. Open the "
        "address in a browser, and name the folder of the downloaded file with local=.",
    ),
]


@pytest.mark.parametrize(("status", "headers", "told"), REFUSALS)
def test_refusals_word_by_word(status, headers, told):
    response = httpx.Response(status, headers=headers, request=httpx.Request("GET", "https://h/f"))
    with pytest.raises(DownloadError) as error:
        refuse_bad_answer(response, Remote("https://me:pw@h/f"), "a.bin")
    assert str(error.value) == f"https://***@h/f {told}"
    with pytest.raises(TryAgainError, match=r"^HTTP 503 Service Unavailable$") as later:
        refuse_bad_answer(httpx.Response(503, headers={"Retry-After": "7"}), Remote("u"), "a.bin")
    assert later.value.wait_s == 7.0
