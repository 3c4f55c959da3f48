"""Untrusted images: ``data:`` URLs and, where allowed, remote ones -> checked, decoded, resized.

Every bound is checked before the work that it bounds: the length of the base64 text before decoding it, width x height
and the structure of the file before any pixel. Only pixels leave; the bytes are never stored or sent on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pipelines.serving.decoder_process import DecodeError, DecodeJob, too_many_bytes
from pipelines.serving.decoders import DecoderBusy, ImageDecoders
from pipelines.serving.errors import ProtocolError, unavailable
from pipelines.serving.fetch import FetchError, fetch
from pipelines.serving.turns import ImageReference
from pipelines.settings import ServeSettings
from tinygptv.data.conversation import ChatImage
from tinygptv.data.data_url import DataURL, DataURLError

_MEGA = 1_000_000
_IMAGE_TYPES = ("image/", "application/octet-stream", "binary/octet-stream")


class MediaLoader:
    """Turns image URLs into images for the model, within the settings' bounds."""

    def __init__(self, settings: ServeSettings, decoders: ImageDecoders | None = None) -> None:
        """Set the bounds.

        Args:
            settings: the bounds.
            decoders: processes that several loaders share.
        """
        self.settings = settings
        self.max_bytes = int(settings.max_image_mb * _MEGA)
        self.max_pixels = int(settings.max_image_megapixels * _MEGA)
        self.decoders = decoders or ImageDecoders(settings.image_decoders)

    async def load(self, images: Sequence[ImageReference], image_size: int, client: str = "") -> list[ChatImage]:
        """Fetch, check and decode.

        Args:
            images: of one request.
            image_size: side R in pixels.
            client: who sends them.

        Raises:
            ProtocolError: 400 or 413, naming the field and the bound; 503 where no decoder is free.
        """
        if len(images) > self.settings.max_images:
            raise ProtocolError(
                400,
                f"the request has {len(images)} images; this server takes {self.settings.max_images}.",
                param=images[self.settings.max_images].param,
                code="too_many_images",
            )
        tasks = [asyncio.create_task(self._load_one(image, image_size, client)) for image in images]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()  # where another one failed

    async def _load_one(self, image: ImageReference, image_size: int, client: str) -> ChatImage:
        is_data = image.url[:5].lower() == "data:"
        source = self._split(image) if is_data else await self._fetch(image)
        job = DecodeJob(source, image_size, self.max_bytes, self.max_pixels)
        timeout_s = self.settings.image_timeout_s
        try:
            result = await self.decoders.decode(job, client=client, wait_s=timeout_s, timeout_s=timeout_s)
        except DecoderBusy:
            raise unavailable("every image decoder is busy; try again soon.", image.param) from None
        except TimeoutError:
            raise ProtocolError(
                400,
                f"the image took more than {timeout_s:g} s to decode: send a smaller one.",
                param=image.param,
                code="image_timeout",
            ) from None
        if isinstance(result, DecodeError):
            status = 413 if result.code == "image_too_large" else 400
            raise ProtocolError(status, result.message, param=image.param, code=result.code)
        return result

    def _split(self, image: ImageReference) -> DataURL:
        try:
            url = DataURL.split(image.url)
            if url.media_type and not url.media_type.startswith(_IMAGE_TYPES):
                raise DataURLError(f"it is of type {url.media_type[:60]!r}, not an image")
        except DataURLError as error:
            raise ProtocolError(
                400,
                f"an image must be a data URL such as data:image/jpeg;base64,...; {error}.",
                param=image.param,
                code="invalid_image_url",
            ) from None
        if url.least_bytes > self.max_bytes:
            raise ProtocolError(
                413, too_many_bytes(url.least_bytes, self.max_bytes), param=image.param, code="image_too_large"
            )
        return url

    async def _fetch(self, image: ImageReference) -> bytes:
        try:
            return await fetch(
                image.url,
                allowed_hosts=self.settings.allowed_image_hosts,
                max_bytes=self.max_bytes,
                timeout_s=self.settings.image_timeout_s,
            )
        except FetchError as error:
            raise ProtocolError(400, str(error), param=image.param, code="invalid_image_url") from error
