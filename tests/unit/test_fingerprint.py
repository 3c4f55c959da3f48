"""The identity of results: the same inputs continue, others are refused by name, overwrite begins again."""

from __future__ import annotations

import json
import os

import pytest

from pipelines import storage
from pipelines.fingerprint import (
    FINGERPRINT_FILE,
    Fingerprint,
    OtherInputsError,
    _is_within,
    _sentence,
    checkpoint_digest,
    claim,
    digest_of,
    manifest_digest,
    refuse_inputs,
)
from pipelines.settings import SettingsError
from tinygptv.checkpoint.folders import write_folder

RESULTS = ("result.json", "states")


def fingerprint(**changes):
    return Fingerprint.of(
        "train", **{"seed": 0, "data": {"own": "abc"}, "stage": {"peak": 1e-3, "sources": [1, 2]}, **changes}
    )


def test_the_same_inputs_continue_whatever_their_order(tmp_path):
    assert claim(tmp_path, fingerprint(), RESULTS) is False
    (tmp_path / "result.json").write_text("{}")
    assert claim(tmp_path, fingerprint(**{"stage": {"sources": [1, 2], "peak": 1e-3}}), RESULTS) is True
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == {
        "job": "train",
        "data.own": "abc",
        "seed": 0,
        "stage.peak": 1e-3,
        "stage.sources": [1, 2],
    }


def test_other_inputs_are_refused_with_the_differences_named(tmp_path):
    claim(tmp_path, fingerprint(), RESULTS)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(OtherInputsError) as refused:
        claim(tmp_path, fingerprint(seed=7, data={"own": "abd", "new": "x"}), RESULTS)
    text = str(refused.value)
    assert str(tmp_path) in text and "overwrite=true" in text
    assert "seed was 0, is now 7" in text and 'data.own was "abc", is now "abd"' in text
    assert 'data.new was absent, is now "x"' in text and "peak" not in text
    assert (tmp_path / "result.json").read_text() == "{}", "nothing is touched"
    with pytest.raises(OtherInputsError, match="and 4 more"):
        claim(tmp_path, Fingerprint.of("train", **{f"key{i}": i for i in range(5)}), RESULTS)


def test_overwrite_removes_what_the_job_writes_and_nothing_else(tmp_path):
    claim(tmp_path, fingerprint(), RESULTS)
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "states/step").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    assert claim(tmp_path, fingerprint(seed=7), RESULTS, overwrite=True) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == [FINGERPRINT_FILE, "notes.txt"]
    assert claim(tmp_path, fingerprint(seed=7), RESULTS) is True


def test_an_overwrite_that_is_killed_can_be_repeated(tmp_path, monkeypatch):
    """What is left must still be known as this job's own."""
    claim(tmp_path, fingerprint(), RESULTS)
    for name in RESULTS:
        (tmp_path / name).write_text("{}")

    remove = storage.remove_file

    def killed(location):
        """After the first file."""
        remove(location)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(storage, "remove_file", killed)
        claim(tmp_path, fingerprint(seed=7), RESULTS, overwrite=True)
    assert claim(tmp_path, fingerprint(seed=7), RESULTS, overwrite=True) is False
    assert [path.name for path in tmp_path.iterdir()] == [FINGERPRINT_FILE]


@pytest.mark.parametrize("overwrite", [False, True])
def test_results_of_another_job_are_never_replaced(tmp_path, overwrite):
    claim(tmp_path, fingerprint(), RESULTS)
    (tmp_path / "result.json").write_text("{}")
    told = rf"^{tmp_path} holds results of another job \(train\): give another output="
    with pytest.raises(OtherInputsError, match=told):
        claim(tmp_path, Fingerprint.of("score", seed=0), RESULTS, overwrite=overwrite)
    assert (tmp_path / "result.json").is_file()


def test_results_without_recorded_inputs_are_refused_and_foreign_files_are_not(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "result.json").touch()  # empty: a kill, or a full disk
    claim(tmp_path / "a", fingerprint(), RESULTS)
    claim(tmp_path, fingerprint(), RESULTS)
    (tmp_path / FINGERPRINT_FILE).unlink()
    (tmp_path / "states").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OtherInputsError, match=f"^{tmp_path} holds states, but no fingerprint.*, or remove states"):
            claim(tmp_path, fingerprint(), RESULTS, overwrite=overwrite)
    assert (tmp_path / "states").is_dir(), "it may be somebody else's"
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(OtherInputsError, match=f"^{tmp_path} holds result.json, but .*, or remove result.json"):
        claim(tmp_path, fingerprint(), RESULTS)
    assert not (tmp_path / FINGERPRINT_FILE).exists(), "a refusal claims nothing"


def test_names_and_inputs_that_can_be_read_once_are_all_looked_at(tmp_path):
    (tmp_path / "states").mkdir()
    with pytest.raises(OtherInputsError, match="holds states, but no fingerprint"):
        claim(tmp_path, fingerprint(), iter(RESULTS), inputs=iter(["", "/elsewhere"]))
    with pytest.raises(SettingsError, match=r"^/out/b/c is an input, and /out/b is written by this job: give another"):
        refuse_inputs(iter(["/out/a", "/out/b"]), iter(["", "/else", "/out/b/c"]))


@pytest.mark.parametrize("path", ["states", "states/step-1", "../{name}/states"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_never_written_to(tmp_path, path, overwrite):
    (tmp_path / "states/step-1").mkdir(parents=True)
    given = tmp_path / path.format(name=tmp_path.name)
    with pytest.raises(SettingsError, match=r"is an input, and .*states is written by this job"):
        claim(tmp_path, fingerprint(), RESULTS, overwrite=overwrite, inputs=["", str(given)])
    assert (tmp_path / "states/step-1").is_dir()
    claim(tmp_path / "out", fingerprint(), RESULTS, inputs=[str(tmp_path / "states"), "memory://b/out/states"])


def test_a_uri_can_be_claimed(tmp_path):
    place = f"memory://bucket/{tmp_path.name}"
    assert claim(place, fingerprint(), RESULTS) is False and claim(place, fingerprint(), RESULTS) is True
    with pytest.raises(OtherInputsError, match="seed was 0, is now 1"):
        claim(place, fingerprint(seed=1), RESULTS)


def test_passwords_are_not_kept(tmp_path):
    claim(tmp_path, fingerprint(data="s3://key:secret@bucket/a"), RESULTS)
    assert "secret" not in (tmp_path / FINGERPRINT_FILE).read_text()


def test_a_checkpoint_is_known_by_what_it_computes_with(tmp_path):
    def write(folder, **files):
        return write_folder(folder, lambda staging: [(staging / n).write_text(t) for n, t in files.items()])

    one = write(tmp_path / "a", **{"model.safetensors": "w", "stage.json": "here", "README.md": "card"})
    same = write(tmp_path / "b", **{"model.safetensors": "w", "stage.json": "there", "README.md": "other card"})
    other = write(tmp_path / "c", **{"model.safetensors": "v", "stage.json": "here", "README.md": "card"})
    assert checkpoint_digest(one) == checkpoint_digest(same) != checkpoint_digest(other)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/model.safetensors").write_text("w")
    before = checkpoint_digest(tmp_path / "plain")
    (tmp_path / "plain/cache").mkdir()
    assert checkpoint_digest(tmp_path / "plain") == before, "its files alone"
    path = tmp_path / "plain/model.safetensors"
    changed = path.stat().st_mtime_ns
    for text, seconds in (("longer", 0), ("v", 0), ("v", 1)):
        path.write_text(text)
        os.utime(path, ns=(changed, changed + seconds))
        assert (checkpoint_digest(tmp_path / "plain") == before) is (text == "v" and not seconds)


def test_nested_inputs_have_dotted_names():
    found = Fingerprint.of("x", b={"c": {"d": 1, "e": [{"f": 2}]}, "g": {}}, a=None)
    assert dict(found.inputs) == {"job": "x", "a": None, "b.c.d": 1, "b.c.e": [{"f": 2}]}


def test_names_come_in_order_and_five_differences_are_all():
    found = Fingerprint.of("x", b=1, a={"z": 1, "y": 2})
    assert list(found.inputs) == ["job", "a.y", "a.z", "b"]
    for count, more in ((5, ""), (6, "; and 1 more"), (7, "; and 2 more")):
        one, two = (Fingerprint.of("x", **{f"k{i}": value for i in range(count)}) for value in (0, 1))
        text = _sentence(two.differences(one))
        assert text == "; ".join(f"k{i} was 0, is now 1" for i in range(5)) + more


@pytest.mark.parametrize(
    ("path", "folder", "within"),
    [
        ("/a/b", "/a/b", True),
        ("/a/b/", "/a/b", True),
        ("/a/b/c", "/a/b/", True),
        ("/a/bc", "/a/b", False),
        ("/a", "/a/b", False),
        ("s3://x/a/b", "s3://x/a/", True),
        ("s3://x/a/", "s3://x/a", True),
        ("s3://x/ab", "s3://x/a", False),
        ("s3://x/a", "/x/a", False),
        ("/x/a", "s3://x/a", False),
        ("s3://x/a/b/", "s3://x/a/b", True),
        ("s3://x/a/b", "s3://x/a/b", True),
        ("memory://x/a", "s3://x/a", False),
        ("file:///a/b/c", "/a/b", True),
    ],
)
def test_what_lies_within_a_folder(path, folder, within):
    assert _is_within(path, folder) is within


def test_links_do_not_hide_an_input(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert _is_within(str(tmp_path / "link/x"), str(tmp_path / "real"))
    assert _is_within(str(tmp_path / "real/x"), str(tmp_path / "link"))


def test_files_of_a_checkpoint_count_in_order_of_their_names(tmp_path, monkeypatch):
    files = {"b": {"sha256": "2"}, "a": {"sha256": "1"}, "README.md": {"sha256": "3"}}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert checkpoint_digest(tmp_path) == manifest_digest(tmp_path) == digest_of([["a", "1"], ["b", "2"]])
    (tmp_path / "manifest.json").unlink()
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(5, 5))
    paths = sorted(tmp_path.iterdir(), reverse=True)
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda folder: iter(paths))
    assert checkpoint_digest(tmp_path) == digest_of([["a", "1 5"], ["b", "1 5"]])
    assert not manifest_digest(tmp_path), "the times of files are another machine's others"


def test_digests_differ_with_any_value():
    assert digest_of({"a": 1, "b": [2.0]}) == digest_of({"a": 1, "b": [2.0]}) != digest_of({"a": 1, "b": [2.5]})
    assert len(digest_of({})) == 12 and set(digest_of({})) <= set("0123456789abcdef"), "48 bits"
