"""A loopback server of published files: the hub's protocol as far as downloads need it, plain addresses, and faults."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

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
        """The next answer for a path: status=, headers=, body=, cut_at= (where in the file the connection ends)."""
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

        def answer(self):
            path = unquote(urlsplit(self.path).path)  # a request through a proxy names the whole address
            files.requests.append((self.command, path, dict(self.headers)))
            fault = files.faults[path].pop(0) if self.command == "GET" and files.faults[path] else {}
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
                start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
                if start >= len(content):
                    self.send(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": 0})
                    return
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
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


def hub_headers(path, content):
    """What the hub says about a file: SHA-256 of large ones, git's SHA-1 of small ones."""
    if path.endswith((".pth", ".safetensors")):
        digest = hashlib.sha256(content).hexdigest()
    else:
        digest = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    return {"X-Repo-Commit": COMMIT, "X-Linked-Size": len(content), "X-Linked-ETag": f'"{digest}"'}
