"""The loader of a request's images, beside decoders and a fetcher that only say what they were asked."""

from __future__ import annotations

import asyncio
import base64
import re

import pytest

from pipelines.serving import media
from pipelines.serving.decoder_process import DecodeError, DecodeJob
from pipelines.serving.decoders import DecoderBusy
from pipelines.serving.errors import ProtocolError
from pipelines.serving.fetch import FetchError
from pipelines.serving.media import MediaLoader
from pipelines.serving.turns import ImageReference
from pipelines.settings import ServeSettings
from tinygptv.data.data_url import DataURL

pytestmark = pytest.mark.security

PNG = "data:image/png;base64,QUJDRA=="


class Decoders:
    """Decoders that answer with what they were given: an error to raise, or a result."""

    def __init__(self, answer: object = None) -> None:
        self.answer = answer
        self.asked: list[tuple[DecodeJob, dict[str, object]]] = []

    async def decode(self, job: DecodeJob, **options: object) -> object:
        self.asked.append((job, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or len(self.asked)


def load(decoders: Decoders, *urls: str, side: int = 16, **settings: object) -> list[object]:
    loader = MediaLoader(ServeSettings(**settings), decoders)
    return asyncio.run(loader.load([ImageReference(f"field.{i}", url) for i, url in enumerate(urls)], side, "a"))


def refusal(decoders: Decoders, *urls: str, **settings: object) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        load(decoders, *urls, **settings)
    return caught.value


def shown(error: ProtocolError) -> tuple[object, ...]:
    return error.status, error.message, error.kind, error.param, error.code, error.retry_after_s


def test_each_image_reaches_the_decoders_with_the_bounds_of_the_settings():
    decoders = Decoders()
    settings = {"max_image_mb": 1.5, "max_image_megapixels": 2.25, "image_timeout_s": 7}
    assert load(decoders, PNG, "DATA:,%41", side=24, **settings) == [1, 2], "in the order of the request"
    bounds = (24, 1_500_000, 2_250_000)
    options = {"wait_s": 7, "timeout_s": 7, "client": "a"}
    assert decoders.asked == [
        (DecodeJob(DataURL("image/png", True, "QUJDRA=="), *bounds), options),
        (DecodeJob(DataURL("", False, "%41"), *bounds), options),
    ]
    assert load(decoders) == []


def test_a_loader_of_its_own_has_as_many_decoders_as_the_settings_say(monkeypatch):
    monkeypatch.setattr(media, "ImageDecoders", lambda number: ("decoders", number))
    assert MediaLoader(ServeSettings(image_decoders=3)).decoders == ("decoders", 3)
    given = Decoders()
    assert MediaLoader(ServeSettings(), given).decoders is given


def test_a_url_of_the_web_is_fetched_within_the_bounds_of_the_settings(monkeypatch):
    asked = []

    async def fetch(url, **options):
        asked.append((url, options))
        return b"file"

    monkeypatch.setattr(media, "fetch", fetch)
    decoders = Decoders()
    hosts = ["other.example", "images.example"]
    load(decoders, "https://images.example/data:x", allowed_image_hosts=hosts, max_image_mb=2, image_timeout_s=7)
    bounds = {"allowed_hosts": hosts, "max_bytes": 2_000_000, "timeout_s": 7}
    assert asked == [("https://images.example/data:x", bounds)]
    assert decoders.asked[0][0].source == b"file"


def test_what_the_fetcher_says_is_the_clients_mistake(monkeypatch):
    async def fetch(url, **_):
        raise FetchError("images may not be fetched from b.example.")

    monkeypatch.setattr(media, "fetch", fetch)
    decoders = Decoders()
    error = refusal(decoders, PNG, "http://b.example/x")
    assert shown(error) == (
        400,
        "images may not be fetched from b.example.",
        "invalid_request_error",
        "field.1",
        "invalid_image_url",
        None,
    )


def test_the_first_image_too_many_is_named_and_none_is_decoded():
    decoders = Decoders()
    error = refusal(decoders, PNG, PNG, PNG, PNG, max_images=2)
    assert shown(error) == (
        400,
        "the request has 4 images; this server takes 2.",
        "invalid_request_error",
        "field.2",
        "too_many_images",
        None,
    )
    assert not decoders.asked and len(load(decoders, PNG, PNG, max_images=2)) == 2


def test_a_busy_decoder_is_the_servers_fault():
    assert shown(refusal(Decoders(DecoderBusy()), PNG)) == (
        503,
        "every image decoder is busy; try again soon.",
        "server_error",
        "field.0",
        "unavailable",
        5,
    )


def test_an_image_that_takes_too_long_is_the_clients():
    assert shown(refusal(Decoders(TimeoutError()), PNG, image_timeout_s=2.5)) == (
        400,
        "the image took more than 2.5 s to decode: send a smaller one.",
        "invalid_request_error",
        "field.0",
        "image_timeout",
        None,
    )


@pytest.mark.parametrize(
    ("code", "status"), [("image_too_large", 413), ("invalid_image", 400), ("invalid_base64", 400)]
)
def test_what_the_decoder_says_is_passed_on(code, status):
    error = refusal(Decoders(DecodeError(code, "the reason.")), PNG)
    assert shown(error) == (status, "the reason.", "invalid_request_error", "field.0", code, None)


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/x-any", "application/octet-stream", "binary/octet-stream", ""])
def test_types_of_images_and_of_unnamed_bytes_are_taken(kind):
    assert load(Decoders(), f"data:{kind};base64,QUJDRA==") == [1]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:text/html;base64,QQ==", "it is of type 'text/html', not an image"),
        ("data:video/image/;base64,QQ==", "it is of type 'video/image/', not an image"),
        (f"data:text/{'x' * 90},a", f"it is of type 'text/{'x' * 55}', not an image"),
        ("data:nothing", "it does not begin with data:[<type>][;base64],"),
    ],
)
def test_other_data_urls_are_refused_with_the_form_that_is_wanted(url, reason):
    decoders = Decoders()
    assert shown(refusal(decoders, url)) == (
        400,
        f"an image must be a data URL such as data:image/jpeg;base64,...; {reason}.",
        "invalid_request_error",
        "field.0",
        "invalid_image_url",
        None,
    )
    assert not decoders.asked


def test_the_size_of_a_data_url_is_compared_before_it_is_decoded():
    decoders = Decoders()
    url = "data:image/png;base64," + base64.b64encode(bytes(1_500_000)).decode()
    assert load(decoders, url, max_image_mb=1.5) == [1]
    error = refusal(decoders, url, max_image_mb=1.499999)
    assert shown(error) == (
        413,
        "the image has 1.5 MB; this server takes 1.5 MB.",
        "invalid_request_error",
        "field.0",
        "image_too_large",
        None,
    )
    assert len(decoders.asked) == 1


def test_where_one_image_is_refused_the_others_are_given_up():
    """A slow image must not keep a decoder after its request has been answered."""
    ended = []

    class Slow(Decoders):
        async def decode(self, job, **_):
            if re.search("REZ", job.source.text):
                raise TimeoutError
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append(job)
                raise

    async def request():
        loader = MediaLoader(ServeSettings(), Slow())
        images = [ImageReference("slow", PNG), ImageReference("broken", "data:image/png;base64,REZ=")]
        with pytest.raises(ProtocolError, match="took more than"):
            await loader.load(images, 16)
        await asyncio.sleep(0)
        return len(ended)

    assert asyncio.run(request()) == 1, "cancelled by the loader, not by the end of the event loop"
