"""Identity of a client: API key or address, as far as admission and the prefix cache must tell clients apart."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from pipelines.serving.errors import ProtocolError
from pipelines.settings import ServeSettings, SettingsError

KEYS_VARIABLE = "TINYGPTV_API_KEYS"
"""Environment variable with API keys, separated by commas or white space."""


@dataclass(frozen=True)
class Client:
    """A client.

    Attributes:
        name: tells clients apart; never the key itself.
        salt: clients with different salts share no cached prompts or images; 0 where everybody is trusted alike.
    """

    name: str
    salt: int = 0


class ClientIdentifier:
    """Checks API keys and names clients. Holds SHA-256 digests, not keys."""

    def __init__(self, key_digests: Sequence[bytes], trusted_proxies: Sequence[str] = ()) -> None:
        """Set who is known.

        Args:
            key_digests: ``digest_of`` each accepted key; none accepts everybody.
            trusted_proxies: addresses or networks whose ``X-Forwarded-For`` names the client.
        """
        self.key_digests = tuple(key_digests)
        self.trusted_proxies = tuple(ipaddress.ip_network(proxy, strict=False) for proxy in trusted_proxies)

    def identify(self, request: Request) -> Client:
        """Check the bearer token, in constant time whatever it is.

        Raises:
            ProtocolError: 401.
        """
        if not self.key_digests:
            return Client(self._address_of(request))
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return self._client_of(token.strip() if scheme.lower() == "bearer" else "")

    def identify_browser(self, request: Request) -> Client:
        """The same for pages that browsers and scrapers open: the key may also be the password of HTTP Basic.

        Only for GET: a browser sends Basic credentials by itself, so nothing that acts may take them.

        Raises:
            ProtocolError: 401.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not self.key_digests or scheme.lower() != "basic":
            return self.identify(request)
        try:
            _, _, password = base64.b64decode(token, validate=True).decode().partition(":")
        except ValueError:
            password = ""
        return self._client_of(password)

    def _client_of(self, key: str) -> Client:
        digest = digest_of(key)
        # A list, not a generator: every key is compared, so the time does not depend on which one matches.
        if not any([hmac.compare_digest(digest, known) for known in self.key_digests]):
            raise ProtocolError(
                401,
                "this server needs an API key: send it as 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
            )
        return Client("key-" + digest.hex()[:16], int.from_bytes(hashlib.sha256(b"salt" + digest).digest()[:7], "big"))

    def _address_of(self, request: Request) -> str:
        ip = _ip_of(request.client.host if request.client else "")
        is_proxy = ip is not None and any(ip in network for network in self.trusted_proxies)
        # The proxy's own entry is the last: some proxies add to a header that the client sent, some add a header.
        if is_proxy and (forwarded := request.headers.getlist("x-forwarded-for")):
            ip = _ip_of(forwarded[-1].rpartition(",")[2])
        if ip is None:
            return "unknown"
        # Whoever has one IPv6 address has the 2**64 of its network.
        return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def _ip_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, IPv4 where a socket of both kinds writes it as IPv6 (``::ffff:10.0.0.1``); None where it is none."""
    text = text.strip()
    for address in (text, text.rpartition(":")[0].strip("[]")):  # some proxies add the port
        try:
            ip = ipaddress.ip_address(address.partition("%")[0])
            break
        except ValueError:
            continue
    else:
        return None
    return (ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None) or ip


def digest_of(key: str) -> bytes:
    """SHA-256 of an API key."""
    return hashlib.sha256(key.encode()).digest()


def key_digests(settings: ServeSettings) -> tuple[bytes, ...]:
    """Digests of all keys: the settings', their ``api_keys_file``'s and the environment's.

    Raises:
        SettingsError: the file is missing, or it or the variable is there and holds no key.
    """
    keys = [key.get_secret_value() for key in settings.api_keys]
    if settings.api_keys_file:
        path = Path(settings.api_keys_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise SettingsError(f"api_keys_file={path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError:
            raise SettingsError(f"api_keys_file={path} is no text in UTF-8.") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise SettingsError(f"api_keys_file={path} holds no key: write one per line, or leave the setting empty.")
        keys += found
    if KEYS_VARIABLE in os.environ:
        found = os.environ[KEYS_VARIABLE].replace(",", " ").split()
        if not found:
            raise SettingsError(f"the environment variable {KEYS_VARIABLE} holds no key: set one, or unset it.")
        keys += found
    return tuple(dict.fromkeys(digest_of(key) for key in keys))
