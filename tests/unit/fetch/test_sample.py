"""Samples of data sets: the first rows and the images that they name, in the layout of whole sets."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest

from pipelines.data.ingest.job import ingest
from pipelines.fetch.addresses import published_address
from pipelines.fetch.datasets import all_sets, find_sets
from pipelines.fetch.http import DownloadError, Retries
from pipelines.fetch.run import fetch
from pipelines.settings import FetchSettings, PrepareDataSettings, SettingsError
from tests.dataset_files import BY_HAND, build, publish_data, publish_images
from tests.hub_server import serve_files

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
