"""The web page and its files, from the package; nothing on it comes from another address."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

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


def add_pages(app: FastAPI, guard: Callable[[Request], None]) -> None:
    """Serve ``ui/index.html`` at ``/``, ``ui/docs.html`` at ``/docs`` and every other file of ``ui`` under ``/ui/``.

    Args:
        app: where to.
        guard: dependency of ``/docs``.
    """
    folder = files("pipelines.serving") / "ui"
    for file in folder.iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in TYPES:
            path = {"index.html": "/", "docs.html": "/docs"}.get(file.name, f"/ui/{file.name}")
            _add_page(app, path, file.read_bytes(), TYPES[suffix], guard if path == "/docs" else None)


def _add_page(
    app: FastAPI, path: str, content: bytes, media_type: str, guard: Callable[[Request], None] | None
) -> None:
    @app.get(path, include_in_schema=False, dependencies=[Depends(guard)] if guard else [])
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)
