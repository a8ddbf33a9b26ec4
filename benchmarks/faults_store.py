"""A web server for `faults.py` that can be slow, answer with errors, and be gone."""

import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class Store:
    """Serves files and ranges of them under `folder` on one port of the loopback address."""

    def __init__(self, folder: Path) -> None:
        self._latency = 0.0
        self._status: int | None = None
        self.requests, self.failed = 0, 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                store.requests += 1
                time.sleep(store._latency)
                path = folder / self.path.lstrip("/")
                if store._server is None:
                    store.failed += 1
                    self.close_connection = True
                elif store._status is not None:
                    store.failed += 1
                    self.answer(store._status)
                elif not path.is_file():
                    self.answer(404)
                else:
                    self.send_file(path)

            def send_file(self, path: Path) -> None:
                size = path.stat().st_size
                wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                start, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, size - 1)
                last = min(last, size - 1)
                with path.open("rb") as file:
                    data = os.pread(file.fileno(), last - start + 1, start)
                whole = {"Content-Range": f"bytes {start}-{last}/{size}"} if wanted else {}
                self.answer(206 if wanted else 200, data, whole)

            def answer(
                self, status: int, data: bytes = b"", headers: dict[str, str] | None = None
            ) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        self._handler = Handler
        self._port = 0
        self._server: _Server | None = None
        self.come_back()
        self.url = f"http://127.0.0.1:{self._port}"

    def be_slow(self, seconds: float) -> None:
        """Let so much time pass before each answer."""
        self._latency = seconds

    def answer_with(self, status: int) -> None:
        """Answer with a status in place of all files."""
        self._status = status

    def answer_files(self) -> None:
        """Answer with files again."""
        self._status = None

    def come_back(self) -> None:
        """Listen, on the same port as before."""
        self._server = _Server(("127.0.0.1", self._port), self._handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def leave(self) -> None:
        """Nobody listens, and open connections end with their next request."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
