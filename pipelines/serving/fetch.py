"""Fetch a file from an allowed host only.

A URL in a request makes this server open a connection, so the request's author must not choose where to: the host must
be on the list, its name is resolved once, every address must be public, and the connection goes to the address that was
checked. Redirects are not followed, proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

CONNECT_TIMEOUT_S = 5.0

_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
"""All that is assigned to the internet; site-local, IPv4-compatible and translated addresses lie outside."""

_SPECIAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        "2001::/23",  # protocols: Teredo has an IPv4 address inside
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4 has an IPv4 address inside
        "3fff::/20",  # documentation
        "192.0.0.0/24",  # protocols
        "192.88.99.0/24",  # 6to4 relays
    )
)
"""Networks that ``is_global`` of some Python version passes."""


class FetchError(ValueError):
    """The file was not fetched; the message may be shown to the client."""


def is_public(address: str) -> bool:
    """Whether an IP address certainly belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip not in _PUBLIC_IPV6:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _SPECIAL)


async def fetch(url: str, *, allowed_hosts: Sequence[str], max_bytes: int, timeout_s: float) -> bytes:
    """Download a file.

    Args:
        url: http or https.
        allowed_hosts: exact host names; ``name:port`` where the port is not the scheme's own.
        max_bytes: bound on the body, counted while it arrives.
        timeout_s: bound on everything together, in seconds.

    Raises:
        FetchError: the host is not allowed or not public, or the file is missing, too large or too slow.
    """
    if not allowed_hosts:
        raise FetchError(
            "this server takes images as base64 data URLs only; fetching URLs is switched off (allowed_image_hosts)."
        )
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode().lower(), parts.port
    except (UnicodeError, ValueError):
        raise FetchError("the image's URL is not valid.") from None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise FetchError("the image's URL must be http://host/... or https://host/..., without a user name.")
    own_port = 443 if parts.scheme == "https" else 80
    port = port or own_port
    with_port = f"{host}:{port}"
    allowed = {entry.lower() for entry in allowed_hosts}
    if with_port not in allowed and (port != own_port or host not in allowed):
        named = host if port == own_port else with_port
        raise FetchError(f"images may not be fetched from {named}; ask this server's operator to allow it.")
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
