"""A process that decodes images and nothing else: what is behind ``decoders.ImageDecoders``.

It reads jobs from a socket and answers each with an image or an error. Its memory is bounded, it can write no files,
its environment has no secrets, and whoever started it kills it where a job takes too long. It loads NumPy and Pillow
only.

Answers are JSON and pixels, not pickles: a decoder that an image has taken over must not be able to run code elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from PIL import Image

from tinygptv.data.conversation import ChatImage
from tinygptv.data.data_url import DataURL, DataURLError
from tinygptv.data.image_structure import check_structure

DECODED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Accepted image formats; SVG, TIFF, PDF and the rest never reach a decoder."""

MEMORY_BYTES = 3_000_000_000
"""Address space of the process: a decoded image of the pixel bound, some copies of it, and the libraries."""


READY = b"ready"


class DecodeJob(NamedTuple):
    """An encoded image, and the bounds that it has to keep.

    Attributes:
        source: file bytes, or a data URL.
        image_size: side R of the result in pixels.
        max_bytes: bound on the file.
        max_pixels: bound on width x height, checked before a pixel is decoded.
    """

    source: bytes | DataURL
    image_size: int
    max_bytes: int
    max_pixels: int


class DecodeError(NamedTuple):
    """Why an image is refused.

    Attributes:
        code: ``invalid_base64``, ``image_too_large`` or ``invalid_image``.
        message: one sentence.
    """

    code: str
    message: str


def decode(job: DecodeJob) -> ChatImage | DecodeError:
    """Check, decode and resize an image."""
    try:
        data = job.source.decode() if isinstance(job.source, DataURL) else job.source
    except DataURLError as error:
        return DecodeError("invalid_base64", f"the data URL cannot be read: {error}.")
    if len(data) > job.max_bytes:
        return DecodeError("image_too_large", too_many_bytes(len(data), job.max_bytes))
    try:
        check_structure(data)
    except ValueError as error:
        return DecodeError("invalid_image", str(error))
    megapixels = f"this server takes {job.max_pixels / 1e6:g} megapixels."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, higher bound on pixels
            header = Image.open(io.BytesIO(data), formats=DECODED_FORMATS)
    except Image.DecompressionBombError:
        return DecodeError("image_too_large", f"the image has hundreds of megapixels; {megapixels}")
    except Exception:  # decoders raise many kinds of errors on damaged files
        return DecodeError("invalid_image", "the image is not readable as JPEG, PNG, WebP, GIF or BMP.")
    width, height = header.size
    if not 0 < width * height <= job.max_pixels:
        return DecodeError("image_too_large", f"the image has {width} x {height} pixels; {megapixels}")
    try:
        return ChatImage.from_bytes(data, job.image_size)
    except Exception:
        return DecodeError(
            "invalid_image",
            f"the image is a damaged {header.format}: its {width} x {height} pixels cannot be decoded.",
        )


def too_many_bytes(size: int, bound: int) -> str:
    """Reason why a file of ``size`` bytes is refused."""
    return f"the image has {size / 1e6:.1f} MB; this server takes {bound / 1e6:g} MB."


def send_result(connection: Connection, result: ChatImage | DecodeError) -> None:
    """Answer a job."""
    if isinstance(result, DecodeError):
        connection.send_bytes(json.dumps(result._asdict()).encode())
        return
    header = {"number": result.number, "width": result.width, "height": result.height}
    connection.send_bytes(json.dumps(header).encode())
    connection.send_bytes(result.pixels.tobytes())


def receive_result(connection: Connection, image_size: int) -> ChatImage | DecodeError:
    """The other end of ``send_result``.

    Args:
        connection: where an answer has come.
        image_size: side R of the job.

    Raises:
        EOFError: the process has ended.
        ValueError: the answer is not one of ``send_result``.
    """
    try:
        header = json.loads(connection.recv_bytes(10_000))
        if "code" in header:
            return DecodeError(str(header["code"]), str(header["message"]))
        pixels = np.frombuffer(connection.recv_bytes(3 * image_size * image_size), dtype=np.uint8)
        number, width, height = (int(header[name]) for name in ("number", "width", "height"))
        return ChatImage(number, pixels.reshape(3, image_size, image_size), width, height)
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the decoder's answer is none: {error!r}") from error


def main() -> None:
    """Answer jobs until the other end closes the socket, whose file descriptor is the only argument."""
    connection = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes the socket
    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
            resource.setrlimit(limit, (value, value))
    connection.send_bytes(READY)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        send_result(connection, decode(job))


if __name__ == "__main__":
    main()
