"""Data URLs by RFC 2397, as clients write them."""

from __future__ import annotations

import base64
import time

import pytest

from tinygptv.data.data_url import DataURL, DataURLError

pytestmark = pytest.mark.security

DATA = bytes(range(256)) * 3
TEXT = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "header",
    [
        "data:image/jpeg;base64,",
        "data:IMAGE/JPEG;base64,",
        "data:image/jpeg;BASE64,",
        "DATA:image/jpeg;base64,",
        "data:;base64,",
        "data:image/jpeg;name=my%20photo(1).jpg;base64,",
        'data:image/jpeg;name="a;b, c\\" d.jpg";base64,',
        "data:image/jpeg; charset=utf-8 ; base64,",
        "data:image/svg+xml;charset=utf-8;base64,",
        "data:image/*;base64,",
        "data:binary/octet-stream;base64,",
    ],
)
def test_headers(header):
    url = DataURL.split(header + TEXT)
    assert url.is_base64 and url.decode() == DATA and url.least_bytes == len(DATA)
    assert url.media_type == header.partition(":")[2].split(";")[0].lower()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        base64.urlsafe_b64encode(DATA).decode(),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        base64.encodebytes(DATA).decode(),
        base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
        TEXT.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        base64.encodebytes(DATA).decode().replace("\n", "%0A"),
        TEXT[:100] + " " + TEXT[100:],
    ],
    ids=["plain", "url-safe", "unpadded", "wrapped", "crlf", "percent", "percent-wrapped", "space"],
)
@pytest.mark.parametrize("length", [len(DATA), len(DATA) - 1, len(DATA) - 2])
def test_spellings_of_base64(text, length):
    if length != len(DATA):
        text = base64.urlsafe_b64encode(DATA[:length]).decode().rstrip("=")
    url = DataURL.split("data:image/png;base64," + text)
    assert url.decode() == DATA[:length] and url.least_bytes <= length


@pytest.mark.parametrize(("text", "data"), [("QUI==", b"AB"), ("QQ=", b"A"), ("QUJD====", b"ABC"), ("QUJX", b"ABW")])
def test_padding_of_any_length_is_taken_off(text, data):
    assert DataURL.split("data:;base64," + text).decode() == data


def test_without_base64_bytes_are_percent_encoded():
    text = "".join(f"%{byte:02X}" for byte in DATA)
    url = DataURL.split("data:image/png," + text)
    assert not url.is_base64 and url.decode() == DATA and url.least_bytes == len(DATA)


@pytest.mark.parametrize(
    "url",
    ["data:", "data:image/png;base64", "data:image/png", "http://a/b,", "data:image/png;x;y,", "data:png;base64,AA"],
)
def test_other_urls_are_refused(url):
    with pytest.raises(DataURLError, match=r"^it does not begin with data:\[<type>\]\[;base64\],$"):
        DataURL.split(url)


def test_a_header_has_so_many_characters_at_most():
    header = "data:a/b;x="
    assert DataURL.split(header + "y" * (1000 - len(header)) + ",z").text == "z"
    with pytest.raises(DataURLError):
        DataURL.split(header + "y" * (1001 - len(header)) + ",z")


@pytest.mark.parametrize("text", ["####", "QUJ\x00", "A", "QU=JD", "=QUJD", "é", "QUJDQ"])
def test_broken_base64_is_refused(text):
    with pytest.raises(DataURLError, match="base64"):
        DataURL.split("data:image/png;base64," + text).decode()


@pytest.mark.parametrize(
    "header", [";a=" + " " * 300, ';a="' * 300, ';a="x;a="' * 100, ";=" * 400, "; " * 400, "x/" * 400, ";base64" * 100]
)
def test_no_header_takes_long(header):
    started = time.process_time()
    with pytest.raises(DataURLError):
        DataURL.split("data:image/png" + header + "!")
    assert time.process_time() - started < 1
