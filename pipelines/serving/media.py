"""Pictures from strangers: ``data:`` URLs and, where allowed, remote ones -> checked, decoded, resized.

Every bound is checked before the work that it bounds: the length of the base64 text before decoding it, width x height
from the header before any pixel. Only pixels leave this file; the bytes are never stored or sent on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from pipelines.serving.fetch import FetchError, fetch
from pipelines.serving.protocol import ProtocolError
from pipelines.settings import ServeSettings
from tinygptv.data.conversation import ChatImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What a picture may be; SVG, TIFF, PDF and the rest never reach a decoder."""

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w-]+=[\w.-]+)*;base64,", re.ASCII)
_MEGA = 1_000_000


class MediaLoader:
    """Turns image URLs into pictures for the model, within the settings' bounds."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.max_bytes = int(settings.max_image_mb * _MEGA)
        self.max_pixels = int(settings.max_image_megapixels * _MEGA)
        # Few threads: the pixel bound times their number bounds the memory.
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")

    async def load(self, urls: list[tuple[str, str]], image_size: int) -> list[ChatImage]:
        """Fetch, check and decode.

        Args:
            urls: pairs (field of the request, URL).
            image_size: side R in pixels.

        Raises:
            ProtocolError: 400 or 413, naming the field and the bound.
        """
        if len(urls) > self.settings.max_images:
            raise ProtocolError(
                400,
                f"the request holds {len(urls)} images; this server takes {self.settings.max_images}.",
                param=urls[self.settings.max_images][0],
                code="too_many_images",
            )
        return list(await asyncio.gather(*(self._load_one(param, url, image_size) for param, url in urls)))

    async def _load_one(self, param: str, url: str, image_size: int) -> ChatImage:
        data = self._decode_url(url, param) if url[:5].lower() == "data:" else await self._fetch(url, param)
        work = asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, data, param, image_size)
        try:
            return await asyncio.wait_for(work, self.settings.image_timeout_s)
        except TimeoutError:
            raise ProtocolError(
                400,
                f"the image took more than {self.settings.image_timeout_s:g} s to decode: send a smaller one.",
                param=param,
                code="image_timeout",
            ) from None

    def _decode_url(self, url: str, param: str) -> bytes:
        match = _DATA_URL.match(url[:200])
        if not match or not (match["type"] or "image/").startswith(("image/", "application/octet-stream")):
            raise ProtocolError(
                400,
                "an image must be a base64 data URL such as data:image/jpeg;base64,...",
                param=param,
                code="invalid_image_url",
            )
        self._check_bytes((len(url) - match.end()) * 3 // 4, param)
        try:
            return base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise ProtocolError(400, "the data URL is not valid base64.", param=param, code="invalid_base64") from None

    async def _fetch(self, url: str, param: str) -> bytes:
        try:
            return await fetch(
                url,
                allowed_hosts=self.settings.allowed_image_hosts,
                max_bytes=self.max_bytes,
                timeout_s=self.settings.image_timeout_s,
            )
        except FetchError as error:
            raise ProtocolError(400, str(error), param=param, code="invalid_image_url") from error

    def _check_bytes(self, size: int, param: str) -> None:
        if size > self.max_bytes:
            raise ProtocolError(
                413,
                f"the image has {size / _MEGA:.1f} MB; this server takes {self.settings.max_image_mb:g} MB.",
                param=param,
                code="image_too_large",
            )

    def _too_many_pixels(self, param: str, size: str) -> ProtocolError:
        message = f"the image has {size}; this server takes {self.settings.max_image_megapixels:g} megapixels."
        return ProtocolError(413, message, param=param, code="image_too_large")

    def _decode(self, data: bytes, param: str, image_size: int) -> ChatImage:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own, higher bound on pixels
                header = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise self._too_many_pixels(param, "hundreds of megapixels") from None
        except Exception:
            raise ProtocolError(
                400,
                "the image is not readable as JPEG, PNG, WebP, GIF or BMP.",
                param=param,
                code="invalid_image",
            ) from None
        width, height = header.size
        if not 0 < width * height <= self.max_pixels:
            raise self._too_many_pixels(param, f"{width} x {height} pixels")
        try:
            return ChatImage.from_bytes(data, image_size)
        except Exception:  # decoders raise what they like on damaged files
            raise ProtocolError(
                400,
                f"the image is a damaged {header.format}: its {width} x {height} pixels cannot be decoded.",
                param=param,
                code="invalid_image",
            ) from None
