"""A loopback server of published files: the hub's protocol as far as downloads need it, plain addresses, and faults."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


class FileServer:
    """Files by address path, faults that answers take in turn, and the requests that came.

    A path with ``/resolve/`` is answered as the hub does: metadata in headers, and a redirect to another address.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[dict]] = defaultdict(list)
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.base = ""

    def fail(self, path, **fault):
        """The next answer for a path: status=, headers=, body=, cut_at= (where in the file the connection ends).

        ``held=(came, end)``, two events: the first is set when the request has come, the second is waited for.
        """
        self.faults[path].append(fault)

    def asked(self, path, method="GET"):
        """Headers of the requests for a path."""
        return [headers for verb, asked, headers in self.requests if asked == path and verb == method]


@contextmanager
def serve_files():
    """A server on a free port of loopback."""
    files = FileServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(files))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    files.base = f"http://127.0.0.1:{server.server_port}"
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(files):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def do_POST(self):
            """The hub's question about paths of a repository: files and folders of its published tree."""
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            path = urlsplit(self.path).path
            files.requests.append((self.command, path, dict(self.headers)))
            tree = json.loads(files.files[path.replace("/paths-info/", "/tree/")])
            body = json.dumps([entry for entry in tree if entry["path"] in asked.get("paths", [])]).encode()
            self.send(200, {"Content-Length": len(body), "Content-Type": "application/json"}, body)

        def answer(self):
            path = unquote(urlsplit(self.path).path)  # a request through a proxy names the whole address
            files.requests.append((self.command, path, dict(self.headers)))
            fault = files.faults[path].pop(0) if self.command == "GET" and files.faults[path] else {}
            if "held" in fault:
                came, end = fault["held"]
                came.set()
                end.wait(600)
            if "status" in fault or "body" in fault:
                body = fault.get("body", b"no")
                headers = {"Content-Length": len(body), "Content-Type": "text/plain", **fault.get("headers", {})}
                self.send(fault.get("status", 200), headers, body)
            elif path.startswith("/cdn/"):
                self.send_file(files.files[path.removeprefix("/cdn")], {}, fault)
            elif path not in files.files:
                self.send(404, {"Content-Length": 0})
            elif "/resolve/" in path:
                content = files.files[path]
                elsewhere = files.base.replace("127.0.0.1", "localhost")  # the hub redirects to other hosts
                location = {"Content-Length": 0, "Location": f"{elsewhere}/cdn{path}"}
                self.send(302, {**location, **hub_headers(path, content)})
            else:
                self.send_file(files.files[path], fault.get("headers", {}), fault)

        def send_file(self, content, headers, fault):
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            headers = {"ETag": tag, "Content-Type": "application/octet-stream", **headers}
            wanted, start, status = self.headers.get("Range"), 0, 200
            if wanted and self.headers.get("If-Range", tag) == tag:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, status, total = int(first), 206, len(content)
                if start >= total:
                    self.send(416, {"Content-Range": f"bytes */{total}", "Content-Length": 0})
                    return
                content = content[: int(last) + 1] if last else content
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{total}"
            headers["Content-Length"] = len(content) - start
            self.send(status, headers, content[start : fault.get("cut_at")])
            if "cut_at" in fault:
                self.close_connection = True

        def send(self, status, headers, body=b""):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def publish_repository(files, folder, repo, kind="models", below=""):
    """Put a folder on a ``FileServer`` as a repository of the hub: its tree, metadata, and files by name.

    Args:
        files: the server.
        folder: with the files.
        repo: ``org/name``.
        kind: ``models`` or ``datasets``.
        below: folder of the repository that they are in.
    """
    tree = [{"type": "directory", "path": below, "size": 0, "oid": "0" * 40}] if below else []
    prefix = f"/{repo}" if kind == "models" else f"/{kind}/{repo}"
    for path in sorted(folder.rglob("*")):
        name = str(PurePosixPath(below) / path.relative_to(folder))
        entry = {"type": "directory" if path.is_dir() else "file", "path": name, "oid": "0" * 40}
        tree.append({**entry, "size": 0 if path.is_dir() else path.stat().st_size})
        for revision in ("main", COMMIT) if path.is_file() else ():
            files.files[f"{prefix}/resolve/{revision}/{name}"] = path.read_bytes()
    siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in tree if entry["type"] == "file"]
    info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False}
    dates = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
    known = json.dumps(info | dates | {"tags": [], "downloads": 0, "likes": 0, "author": "org"}).encode()
    files.files[f"/api/{kind}/{repo}"] = known
    for revision in ("main", COMMIT):
        files.files[f"/api/{kind}/{repo}/revision/{revision}"] = known
        files.files[f"/api/{kind}/{repo}/tree/{revision}"] = json.dumps(tree).encode()


def hub_headers(path, content):
    """What the hub says about a file: SHA-256 of large ones, git's SHA-1 of small ones."""
    if path.endswith((".pth", ".safetensors")):
        digest = hashlib.sha256(content).hexdigest()
    else:
        digest = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    return {"X-Repo-Commit": COMMIT, "X-Linked-Size": len(content), "X-Linked-ETag": f'"{digest}"'}
