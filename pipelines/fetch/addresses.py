"""Where published files are asked for, and the client that asks."""

from __future__ import annotations

import httpx

from pipelines.fetch.http import TIMEOUT, on_mirror
from pipelines.settings import FetchSettings
from tinygptv.convert.sources import SourceFile


def published_address(file: SourceFile) -> str:
    """Where the publisher has it, whatever mirror is used."""
    if file.repo:
        prefix = {"space": "spaces/", "dataset": "datasets/"}.get(file.kind, "")
        return f"https://huggingface.co/{prefix}{file.repo}/resolve/{file.revision}/{file.name}"
    return file.base + file.name


def address(file: SourceFile, settings: FetchSettings) -> tuple[str, dict[str, str]]:
    """Where a file is asked for, and the headers of the request: a token goes to the hub alone."""
    if not file.repo:
        return on_mirror(published_address(file), settings.mirror), {}
    from huggingface_hub import get_token, hf_hub_url

    url = hf_hub_url(
        file.repo, file.name, repo_type=file.kind, revision=file.revision, endpoint=settings.hub.rstrip("/") or None
    )
    token = get_token()
    return url, {"Authorization": f"Bearer {token}"} if token else {}


def open_client() -> httpx.Client:
    """With the timeouts of downloads; proxies are those of the environment."""
    return httpx.Client(timeout=TIMEOUT, headers={"User-Agent": "tinygptv-fetch"})
