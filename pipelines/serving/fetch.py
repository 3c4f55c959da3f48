"""Fetch a file from an allowed host, and from nowhere else.

A URL in a request makes this server open a connection, so the request's author must not choose where to: the host has
to be on the list, its name is resolved once, every address has to be public, and the connection goes to the very
address that was checked. Redirects are not followed, proxies from the environment are not used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

CONNECT_TIMEOUT_S = 5.0

# Addresses that carry an IPv4 address inside: what they reach is not what ``is_global`` looks at.
_TRANSLATED = tuple(ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


class FetchError(ValueError):
    """The file was not fetched; the sentence may be shown to whoever asked."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, for sure."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _TRANSLATED):
            return False
    return ip.is_global and not ip.is_multicast


async def fetch(url: str, *, allowed_hosts: Sequence[str], max_bytes: int, timeout_s: float) -> bytes:
    """Download a file.

    Args:
        url: http or https.
        allowed_hosts: exact host names; ``name:port`` where the port is not the scheme's own.
        max_bytes: bound on the body, counted while it arrives.
        timeout_s: bound on everything together, in seconds.

    Raises:
        FetchError: not allowed, not public, not there, too large or too slow.
    """
    if not allowed_hosts:
        raise FetchError("this server takes images as base64 data URLs only; fetching addresses is switched off.")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode().lower(), parts.port
    except (UnicodeError, ValueError):
        raise FetchError("the image's address is not a valid URL.") from None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise FetchError("the image's address must be http://host/... or https://host/..., without a user name.")
    allowed = {entry.lower() for entry in allowed_hosts}
    if (f"{host}:{port}" if port else host) not in allowed:
        raise FetchError(f"images may not be fetched from {host}; ask this server's operator to allow it.")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(timeout_s):
            address = await _resolve(host, port)
            pinned = httpx.URL(url).copy_with(host=address, port=port, fragment=None)
            return await _download(pinned, parts.netloc, host, max_bytes)
    except TimeoutError:
        raise FetchError(f"{host} did not send the image within {timeout_s:g} s.") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(f"the image could not be fetched from {host} ({type(error).__name__}).") from error


async def _resolve(host: str, port: int) -> str:
    """One address of a host, provided that all of them are public."""
    try:
        answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise FetchError(f"the host {host} is not known.") from None
    addresses = [str(answer[4][0]) for answer in answers]
    if not addresses or not all(is_public(address) for address in addresses):
        raise FetchError(f"{host} is not on the public internet.")
    return addresses[0]


async def _download(pinned: httpx.URL, netloc: str, host: str, max_bytes: int) -> bytes:
    headers = {"Host": netloc, "Accept": "image/*", "Accept-Encoding": "identity"}
    timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=None)
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=timeout) as client:
        # The certificate is checked against the name, though the connection goes to the checked address.
        request = client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": host})
        response = await client.send(request, stream=True)
        try:
            if response.status_code != 200:
                raise FetchError(f"{host} answered with status {response.status_code} instead of the image.")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise FetchError(f"the image at {host} is larger than {max_bytes / 1e6:g} MB.")
            return bytes(body)
        finally:
            await response.aclose()
