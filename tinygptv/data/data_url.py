"""``data:`` URLs (RFC 2397), as browsers and clients write them.

    data:[<media type>][;name=value ...][;base64],<data>

Scheme, media type and ``base64`` in any case; parameter values bare, quoted or percent-encoded; base64 in either
alphabet, wrapped or percent-encoded, with or without padding; without ``;base64`` percent-encoded bytes.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

MAX_HEADER = 1000
"""Most characters before the comma."""

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_HEADER = re.compile(
    # No two alternatives match the same text, so that no header makes the match backtrack for long.
    rf"data:(?P<type>[^;,\s]+/[^;,\s]+)?(?:;\s*[^;,=\s]+\s*=(?:\s*{_QUOTED}|[^;,\"]*))*"
    r"(?P<base64>;\s*base64\s*)?,",
    re.IGNORECASE,
)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\f\v"


class DataURLError(ValueError):
    """The URL is not a data URL, or its data are damaged."""


@dataclass(frozen=True)
class DataURL:
    """A data URL whose data are not decoded yet.

    Attributes:
        media_type: in lower case; empty where the URL names none.
        is_base64: whether the data are base64.
        text: the data as written.
    """

    media_type: str
    is_base64: bool
    text: str

    @classmethod
    def split(cls, url: str) -> DataURL:
        """Read what stands before the comma.

        Raises:
            DataURLError: the URL does not begin like a data URL.
        """
        match = _HEADER.match(url[: MAX_HEADER + 1])
        if match is None:
            raise DataURLError("it does not begin with data:[<type>][;base64],")
        return cls((match["type"] or "").lower(), match["base64"] is not None, url[match.end() :])

    @property
    def least_bytes(self) -> int:
        """Lower bound on the size of the data, in bytes, known without decoding; the size itself where no ``%`` is."""
        if not self.is_base64:
            return len(self.text) - 2 * self.text.count("%")
        ignored = sum(self.text.count(mark) for mark in "= \t\r\n") + 3 * self.text.count("%")
        return max(0, len(self.text) - ignored) * 3 // 4

    def decode(self) -> bytes:
        """The data.

        Raises:
            DataURLError: they are not valid base64.
        """
        data = unquote_to_bytes(self.text) if "%" in self.text or not self.is_base64 else self.text.encode()
        if not self.is_base64:
            return data
        data = data.translate(_URL_SAFE, _WHITE_SPACE).rstrip(b"=")
        try:
            return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except binascii.Error as error:
            raise DataURLError(f"it is not valid base64 ({error})") from None
