"""Samples of data sets: the first rows and the images that they name, in the layout of whole sets."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest

from pipelines.data.ingest.job import ingest
from pipelines.data.sources.json_items import Item
from pipelines.fetch import sample as sample_module
from pipelines.fetch import single_images
from pipelines.fetch.addresses import published_address
from pipelines.fetch.datasets import ImageRule, all_sets, find_sets
from pipelines.fetch.http import DownloadError, Remote, Retries
from pipelines.fetch.run import fetch
from pipelines.fetch.sample import Annotations, Record
from pipelines.settings import FetchSettings, PrepareDataSettings, SettingsError
from tests.dataset_files import BY_HAND, build, publish_data, publish_images
from tests.hub_server import serve_files
from tests.source_files import jpeg

COCO_PATH = "/train2014/COCO_train2014_000000000009.jpg"


@pytest.fixture
def server(tmp_path):
    with serve_files() as files:
        publish_data(files, tmp_path / "published")
        publish_images(files)
        yield files


def sample(server, tmp_path, *sets, **settings):
    values = {"what": ["sample", *sets], "mirror": server.base, "output": str(tmp_path / "raw"), "quiet": True}
    return fetch(FetchSettings(**values | {"rows": 1} | settings), Retries(most=3, sleep=lambda _: None))


def annotation_path(name):
    return urlsplit(published_address(all_sets()[name].files[0])).path


def publish_questions(server, count):
    """VQAv2's list with so many questions, about as many images."""
    entries = [
        {"image": f"train2014/COCO_train2014_{n:012d}.jpg", "question": f"What {n}?", "question_id": n, "answer": ["é"]}
        for n in range(count)
    ]
    path = annotation_path("vqav2")
    server.files[path] = json.dumps(entries, ensure_ascii=False).encode()
    for n in range(count):
        server.files[f"/train2014/COCO_train2014_{n:012d}.jpg"] = server.files[COCO_PATH]
    return path


def test_a_sample_of_every_set_is_read_as_the_whole_set_is(server, tmp_path, capsys):
    local = tmp_path / "by_hand"
    for path in BY_HAND:
        build(local / path)
    result = sample(server, tmp_path, "data", "coco_caption", "ocrvqa", local=[str(local)])
    assert result["by_hand"] == []
    assert len(result["commands"]) == 2 and all("img2dataset" in command for command in result["commands"])
    for each in find_sets("data") + find_sets("coco_caption") + find_sets("ocrvqa"):
        for source in () if each.links else each.sources:
            words = [f"source={source}", f"input={tmp_path}/raw/{each.input}", f"output={tmp_path}/out/{source}"]
            done = ingest(PrepareDataSettings.load(None, [*words, "num_workers=0", "tracking_uri=none", "quiet=true"]))
            assert done["rows_out"] > 0 and done["quarantined"] == 0, source
    assert not [path for _, path, _ in server.requests if "images" in path and path.endswith(".zip")]


def test_only_the_first_rows_and_their_images_are_brought(server, tmp_path, capsys):
    path = publish_questions(server, 50)
    result = sample(server, tmp_path, "vqav2", rows=3)
    kept = json.loads((tmp_path / "raw/vqav2/vqa_train.json").read_text())
    assert [entry["question"] for entry in kept] == ["What 0?", "What 1?", "What 2?"] and kept[0]["answer"] == ["é"]
    assert len(list((tmp_path / "raw/coco/train2014").iterdir())) == 3
    assert "3 images fetched, 0 not there." in capsys.readouterr().out and result["by_hand"] == []
    server.requests.clear()
    sample(server, tmp_path, "vqav2", rows=3)
    assert not server.requests
    assert len(server.asked(path)) == 0


def test_cut_connections_are_tried_again(server, tmp_path):
    path = publish_questions(server, 5)
    server.fail(path, cut_at=100)
    server.fail(path, status=503)
    server.fail("/train2014/COCO_train2014_000000000001.jpg", cut_at=50)
    sample(server, tmp_path, "vqav2", rows=5)
    whole = server.files[COCO_PATH]
    images = list((tmp_path / "raw/coco/train2014").iterdir())
    assert len(images) == 5 and all(image.read_bytes() == whole for image in images)
    assert len(server.asked(path)) == 3


def test_images_that_are_gone_are_counted_and_the_rest_is_there(server, tmp_path, capsys):
    publish_questions(server, 4)
    del server.files["/train2014/COCO_train2014_000000000002.jpg"]
    sample(server, tmp_path, "vqav2", rows=4)
    assert "3 images fetched, 1 not there." in capsys.readouterr().out


def test_every_address_of_an_image_is_tried(server, tmp_path):
    sample(server, tmp_path, "gqa", "textcaps")
    assert (tmp_path / "raw/gqa/images/2405722.jpg").is_file()  # the second folder of Visual Genome
    assert (tmp_path / "raw/textcaps/train_images/0054c91397f2fe05.jpg").is_file()
    assert server.asked("/people/rak248/VG_100K/2405722.jpg") and server.asked("/gone_o.jpg")


def test_an_image_without_an_address_is_told(server, tmp_path):
    path = annotation_path("gqa")
    server.files[path] = json.dumps([{"image": "n161313.jpg", "question": "What?", "answer": "star"}]).encode()
    (text,) = sample(server, tmp_path, "gqa")["by_hand"]
    assert text.startswith("gqa: 1 images are missing; their publisher has them in an archive of 20.5 GB alone")
    assert not [asked for _, asked, _ in server.requests if "161313" in asked]


def test_a_server_of_images_that_fails_ends_it_and_the_next_run_resumes(server, tmp_path):
    publish_questions(server, 3)
    failing = "/train2014/COCO_train2014_000000000002.jpg"
    for _ in range(3):
        server.fail(failing, status=503)
    with pytest.raises(DownloadError, match=r"COCO_train2014_000000000002.jpg from .*3 tries failed.*503"):
        sample(server, tmp_path, "vqav2", rows=3)
    sample(server, tmp_path, "vqav2", rows=3)
    assert len(list((tmp_path / "raw/coco/train2014").glob("*.jpg"))) == 3
    server.fail("/2930_o.jpg", body=b"<html>", headers={"Content-Type": "text/html"})  # of the web: a dead link
    sample(server, tmp_path, "textcaps", rows=3)
    assert not list((tmp_path / "raw/textcaps/train_images").iterdir())


def test_archives_alone_and_what_a_person_fetches_are_told(server, tmp_path):
    build(tmp_path / "by_hand/flickr30k/groundedcaption.json")
    texts = sample(server, tmp_path, "flickr30k", local=[str(tmp_path / "by_hand")])["by_hand"]
    assert "flickr30k: 1 images are missing; their publisher has them in an archive of 4.4 GB alone" in texts[-1]
    texts = sample(server, tmp_path, "multitask_conversation")["by_hand"]
    assert texts[0].endswith("Or name the folder that holds it with local=.")


def test_samples_and_whole_sets_have_folders_of_their_own(server, tmp_path):
    sample(server, tmp_path, "okvqa")
    with pytest.raises(SettingsError, match="holds samples of 1 rows: give rows=1, or another output="):
        sample(server, tmp_path, "okvqa", rows=2)
    whole = {"what": ["okvqa"], "mirror": server.base, "quiet": True}
    with pytest.raises(SettingsError, match="holds samples of data sets: give another output= for whole ones"):
        fetch(FetchSettings(**whole, output=str(tmp_path / "raw")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/fetch.lock.json").write_text("{}")
    with pytest.raises(SettingsError, match="holds whole data sets or weights: give another output= for samples"):
        sample(server, tmp_path, "okvqa", output=str(tmp_path / "other"))
    with pytest.raises(SettingsError, match="nothing is no data set; samples are made of data, data1"):
        sample(server, tmp_path, "nothing")


def test_a_damaged_list_is_one_sentence(server, tmp_path):
    server.files[annotation_path("okvqa")] = b"hello"
    with pytest.raises(DownloadError, match=r"okvqa_train.json is no list of entries: the file does not start as JSON"):
        sample(server, tmp_path, "okvqa")
    server.files[annotation_path("okvqa")] = b"[]"
    with pytest.raises(DownloadError, match=r"okvqa_train.json has no entries"):
        sample(server, tmp_path, "okvqa")
    with pytest.raises(DownloadError, match=r"offline=true, but aokvqa/aokvqa_v1p0_train.json is missing"):
        sample(server, tmp_path, "aokvqa", offline=True)


# ---------------------------------------------------------------- values


def test_a_folders_rows_are_fixed_and_its_files_and_addresses_known(tmp_path):
    record = Record(tmp_path, 5)
    record.urls["ocrvqa"] = {"k": ["http://x"]}
    record.add("a.json")
    again = Record(tmp_path, 5)
    assert (again.files, again.urls) == (["a.json"], {"ocrvqa": {"k": ["http://x"]}})
    for rows in (4, 6):
        with pytest.raises(SettingsError, match="holds samples of 5 rows: give rows=5"):
            Record(tmp_path, rows)


def annotations(folder, rows, **settings):
    given = FetchSettings(what=["sample"], output=str(folder), quiet=True, **settings)
    return Annotations(given, folder, None, Retries(most=1), None, Record(folder, rows))


def test_an_archive_of_annotations_is_cut_once_unpacked_and_removed(tmp_path):
    refs = [{"ref_id": n, "split": split} for n, split in enumerate(["train", "val", "test", "train", "train"])]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("refcoco/refs(unc).p", pickle.dumps(refs, protocol=2))
        archive.writestr("refcoco/list.json", json.dumps([1, 2, 3]))
    target = tmp_path / "refs/refcoco.zip"
    target.parent.mkdir()
    cut = ["refs/refcoco/refs(unc).p", "refs/refcoco/list.json"]
    annotations(tmp_path, 2)._unpack(all_sets()["gqa"], lambda: io.BytesIO(content.getvalue()), target, cut)
    assert (tmp_path / cut[0]).read_bytes()[:2] == b"\x80\x02", "in the published protocol"
    kept = pickle.loads((tmp_path / cut[0]).read_bytes())
    assert [ref["ref_id"] for ref in kept] == [0, 3] and json.loads((tmp_path / cut[1]).read_text()) == [1, 2]
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "member", "kept"),
    [
        ([1, 2, 3, 4], "", [1, 2, 3]),
        ("\ufeff \r\n\t[1, 2, 3, 4]", "", [1, 2, 3]),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "", {"a": 1, "b": 2, "c": 3}),
        ({"info": 1, "annotations": [1, 2, 3, 4]}, "annotations", {"annotations": [1, 2, 3]}),
    ],
)
def test_the_first_entries_are_as_many_as_make_the_rows(tmp_path, monkeypatch, content, member, kept):
    monkeypatch.setattr(sample_module, "_member", lambda each: member)
    each = replace(all_sets()["gqa"], per_entry=2, images=())
    text = content if isinstance(content, str) else json.dumps(content)
    opened = lambda: io.BufferedReader(io.BytesIO(text.encode()))  # noqa: E731
    annotations(tmp_path, 5)._cut(each, tmp_path / "x.json", opened)
    assert json.loads((tmp_path / "x.json").read_text()) == kept


@pytest.mark.parametrize(
    ("text", "member", "told"),
    [
        ("[]", "", "x.json has no entries."),
        ('{"annotations": []}', "annotations", "x.json has no entries in 'annotations'."),
        ('{"a": [1]}', "annotations", "x.json has no entries in 'annotations'."),
        ("[5 5]", "", "x.json is no list of entries: the file is cut off or no valid JSON after byte 4."),
    ],
)
def test_what_holds_no_entries_is_told(tmp_path, monkeypatch, text, member, told):
    monkeypatch.setattr(sample_module, "_member", lambda each: member)
    with pytest.raises(DownloadError) as caught:
        annotations(tmp_path, 5)._cut(
            all_sets()["gqa"], tmp_path / "x.json", lambda: io.BufferedReader(io.BytesIO(text.encode()))
        )
    assert str(caught.value) == told and not (tmp_path / "x.json").exists()


def test_addresses_that_entries_give_are_kept_where_they_are_addresses(tmp_path):
    rule = ImageRule("(.*)", "images/{}", fields=("flickr", "original"), id="image_id")
    each = replace(all_sets()["gqa"], images=(rule, ImageRule("x", "y", urls=("http://h/{}",))))
    known = annotations(tmp_path, 5)
    entries = [
        {"image_id": "a", "flickr": "http://h/a", "original": "ftp://h/a"},
        {"image_id": 7, "original": "https://h/7", "flickr": None},
    ]
    known._note_urls(each, [Item(0, 0, 0, None, entry) for entry in entries])
    assert known.record.urls == {"gqa": {"a": ["http://h/a"], "7": ["https://h/7"]}}
    each = replace(all_sets()["ocrvqa"], images=(replace(rule, id=""),))
    known._note_urls(each, [Item(0, 0, 0, "the key", {"flickr": "http://h/k"}), Item(0, 0, 0, "odd", 5)])
    assert known.record.urls["ocrvqa"] == {"the key": ["http://h/k"], "odd": []}


def test_a_local_copy_is_found_by_its_layout_or_flat(tmp_path):
    local = tmp_path / "usb"
    for name in ("raw/coco/a.json", "b.json", "deep/c.json"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).touch()
    known = annotations(tmp_path, 5, local=[str(local / "raw"), str(local)])
    found = [known.local(path) for path in ("coco/a.json", "coco/b.json", "coco/deep/c.json", "coco/d.json")]
    assert found == [local / "raw/coco/a.json", local / "b.json", local / "deep/c.json", None]
    (local / "b.json").write_text("[1]")
    with known._open(replace(all_sets()["coco"].files[0], path="coco/b.json")) as stream:
        assert stream.read() == b"[1]", "no server is asked"


@pytest.mark.parametrize(
    ("of_web", "answers", "offline", "found", "asked"),
    [
        (False, {"a": 404, "b": 200}, False, True, ["a", "b"]),
        (False, {"a": 200, "b": 200}, False, True, ["a"]),
        (False, {"a": 404, "b": 410}, False, False, ["a", "b"]),
        (True, {"a": 403, "b": 200}, False, True, ["a", "b"]),
        (True, {"a": 503, "b": 404}, False, False, ["a", "a", "b"]),
        (False, {"a": 200, "b": 200}, True, False, []),
    ],
)
def test_an_image_comes_from_the_first_place_that_has_it(tmp_path, of_web, answers, offline, found, asked):
    requests = []

    def answer(request):
        requests.append(request.url.path[1:])
        return httpx.Response(answers[requests[-1]], content=b"image")

    client = httpx.Client(transport=httpx.MockTransport(answer))
    known = replace(
        annotations(tmp_path, 5, offline=offline), client=client, retries=Retries(most=5, sleep=lambda _: None)
    )
    image = single_images.Wanted(("http://h/a", "http://h/b"), of_web)
    assert single_images._fetch_one(known, tmp_path / "x.jpg", image) is found and requests == asked
    assert (tmp_path / "x.jpg").exists() is found


def test_images_that_rows_lack_are_named_once(tmp_path):
    each = replace(all_sets()["gqa"], sources=("gqa", "gqa"), input="gqa")
    assert single_images._missing(each, tmp_path) == [], "there are no annotations yet"
    (tmp_path / "gqa/images").mkdir(parents=True)
    (tmp_path / "gqa/images/there.jpg").write_bytes(jpeg(0))
    entries = [{"image": f"{name}.jpg", "question": "q", "answer": "a"} for name in ("b", "there", "a", "b")]
    (tmp_path / "gqa/train_balanced_questions.json").write_text(json.dumps(entries))
    assert single_images._missing(each, tmp_path) == ["b.jpg", "a.jpg"]
    assert single_images._missing(replace(each, links=all_sets()["laion"].links), tmp_path) == []


def test_a_refused_stream_is_closed(monkeypatch):
    closed = []
    monkeypatch.setattr(httpx.Response, "close", lambda response: closed.append(response.status_code))
    client = httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(404, stream=httpx.ByteStream(b"no")))
    )
    with pytest.raises(DownloadError, match="HTTP 404") as caught:
        sample_module._WebStream(client, Remote("http://h/a"), "a")
    assert caught.tb and closed == [404], "at once, not when the stream is collected"


def test_a_file_of_a_server_is_read_as_far_as_it_is_asked_for():
    data = bytes(range(256)) * 400
    client = httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(200, stream=httpx.ByteStream(data)))
    )
    with io.BufferedReader(sample_module._WebStream(client, Remote("http://h/a"), "a")) as stream:
        assert stream.read(10) == data[:10] and stream.read() == data[10:] and stream.read() == b""


def test_images_are_counted_as_found_or_lost(tmp_path, monkeypatch):
    wanted = {tmp_path / f"{n}.jpg": single_images.Wanted((f"http://h/{n}",)) for n in range(5)}
    monkeypatch.setattr(single_images, "_fetch_one", lambda annotations, path, image: path.stem != "3")
    shown = []
    monkeypatch.setattr(single_images.Bar, "update", lambda bar, *now: shown.append(now))
    assert single_images._fetch_all(annotations(tmp_path, 5), wanted) == 1
    assert shown == [(5, 5, "1 lost")]
    more = {tmp_path / f"{n}": single_images.Wanted() for n in range(41)}
    assert single_images._fetch_all(annotations(tmp_path, 5), more) == 1
    assert [now[:2] for now in shown[1:]] == [(20, 41), (40, 41), (41, 41)]
    ended = []
    shutdown = single_images.ThreadPoolExecutor.shutdown
    with monkeypatch.context() as patched:
        patched.setattr(single_images, "_fetch_one", lambda *_: 1 / 0)
        patched.setattr(
            single_images.ThreadPoolExecutor, "shutdown", lambda pool, **how: ended.append(how) or shutdown(pool, **how)
        )
        with pytest.raises(ZeroDivisionError):
            single_images._fetch_all(annotations(tmp_path, 5), wanted)
    assert ended[0] == {"cancel_futures": True}, "what waits is not begun"
    rule = ImageRule(r"(\d+)\.jpg", "x/{}.jpg", urls=("http://h/{}", "http://i/{}"))
    missing = ["0.jpg", "3.jpg", "none", "neither"]
    monkeypatch.setattr(single_images, "_missing", lambda each, folder: missing)
    each = replace(all_sets()["gqa"], images=(rule,), gigabytes=2.5)
    report = single_images.fetch_images(annotations(tmp_path, 5), [each])
    assert (report.found, report.lost, len(report.left)) == (1, 1, 1)
    assert report.left[0].startswith("gqa: 2 images are missing; their publisher has them in an archive of 2.5 GB")
