"""Images that requests name by path."""

from __future__ import annotations

import pytest

from pipelines.serving import batch_images
from pipelines.serving.batch_images import _message_with_files, _part_with_file, _read_image, with_files
from pipelines.storage import Location


def part(url):
    return {"type": "image_url", "image_url": url}


def test_images_of_all_messages_are_read_and_what_is_wrong_is_left_to_the_api(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    folder = Location.parse(str(tmp_path))
    text = {"type": "text", "text": "a"}
    messages = [
        {"role": "user", "content": [part("a"), text, part({"url": "file://b"})]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "name": "x", "content": [text]},
        "nothing",
        {"role": "user", "content": [5, part(None), part({"detail": "low"}), part("http://h/a"), part("Data:,a")]},
    ]
    read = {name: part(f"data:;base64,{code}") for name, code in (("a", "YQ=="), ("b", "Yg=="))}
    first, *others = with_files(messages, folder)
    assert first == {"role": "user", "content": [read["a"], text, read["b"]]} and others == messages[1:]
    assert messages[0]["content"][0] == part("a"), "a copy"
    assert with_files("x", folder) == "x"
    assert _message_with_files({"role": "user", "content": None}, folder) == {"role": "user", "content": None}


def test_an_image_of_a_bucket_is_below_the_folder_of_the_requests(monkeypatch):
    bucket = Location.parse("s3://bucket/folder")
    monkeypatch.setattr(batch_images.storage, "read_bytes", lambda location: location.uri.encode())
    assert _read_image(bucket, "images/a.png") == b"s3://bucket/folder/images/a.png"
    with pytest.raises(FileNotFoundError) as caught:
        _read_image(bucket, "../secret")
    assert caught.value.filename == "../secret" and caught.value.errno == 2


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("a.png", True),
        ("file://{folder}/a.png", True),
        ("file://{folder}/%61.png", True),
        ("file://localhost{folder}/a.png", True),
        ("{folder}/a.png", True),
        ("data:image/png;base64,eA==", False),
        ("DATA:image/png;base64,eA==", False),
        ("https://host/a.png", False),
    ],
)
def test_paths_of_images_become_data_urls_and_urls_stay(tmp_path, url, read):
    (tmp_path / "a.png").write_bytes(b"x")
    for image in (url.format(folder=tmp_path), {"url": url.format(folder=tmp_path), "detail": "low"}):
        part = {"type": "image_url", "image_url": image}
        found = _part_with_file(part, Location.parse(str(tmp_path)))
        assert found == ({**part, "image_url": "data:;base64,eA=="} if read else part)
