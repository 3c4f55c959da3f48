"""The web page and its files, from the package; nothing on it comes from another address."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

from pipelines.settings import ServeSettings

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI, settings: ServeSettings) -> None:
    """Serve ``ui/index.html`` at ``/`` and every other file of ``ui`` under ``/ui/``."""
    folder = files("pipelines.serving") / "ui"
    for file in folder.iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in TYPES:
            paths = {"index.html": ["/"], "docs.html": ["/docs"]}.get(file.name, [f"/ui/{file.name}"])
            for path in paths:
                _add_page(app, path, file.read_bytes(), TYPES[suffix])


def _add_page(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)
