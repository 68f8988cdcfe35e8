"""A Hugging Face Hub on this machine, of the few answers that a download needs.

Knows the Hub's URLs. Serves files by name from memory, counts what was asked for, and can break off in the middle.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.machine import COMMIT


class Hub:
    """repositories: name -> {file: bytes}. gets: the files that were fetched, in order; begun: those of which only the
    beginning was, and how much. cut: file -> bytes to send of it before the connection breaks."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.gets: list[str] = []
        self.begun: list[tuple[str, int]] = []
        self.cut: dict[str, int] = {}

    def publish(self, name: str, folder: Path) -> None:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of a server for it."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *said: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if rest[:1] == ["revision"] else "main"
        else:
            name, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else ""
        if name not in self.hub.repositories:
            return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"", body)
        if name in self.hub.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"}, b"", body)
        if revision not in ("main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        files = self.hub.repositories[name]
        if parts[0] == "api":
            listed = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            told = json.dumps({"id": name, "sha": COMMIT, "siblings": listed}).encode()
            return self._send(200, {"Content-Type": "application/json"}, told, body)
        file = "/".join(parts[4:])
        if file not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", body)
        data = files[file]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if not body:
            return self._send(200, headers, data, body)
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=0-"):
            part = data[: int(asked.removeprefix("bytes=0-")) + 1]
            self.hub.begun.append((file, len(part)))
            return self._send(206, {**headers, "Content-Range": f"bytes 0-{len(part) - 1}/{len(data)}"}, part, body)
        self.hub.gets.append(file)
        cut = self.hub.cut.pop(file, None)
        self._send(200, headers, data, body, cut)

    def _send(self, status: int, headers: dict[str, str], data: bytes, body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
