"""A server before moto's S3, that passes requests on or has something else come in their place."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.data.storage import transient

HOP_HEADERS = ("transfer-encoding", "connection", "date", "server", "content-length")


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Five, as it is there, turns connections away where many readers begin at once."""


class PassingServer:
    """On the loopback address; `fault` of a subclass says what becomes of each request."""

    def __init__(self, port: int) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = server.fault(self.path)
                if isinstance(fault, int):
                    self.send_response(fault)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                headers = dict(self.headers)
                if fault == "whole":
                    headers.pop("Range", None)
                inner = http.client.HTTPConnection("127.0.0.1", port)
                inner.request(self.command, self.path, body, headers)
                answer = inner.getresponse()
                data = answer.read()
                if fault == "short":
                    data = data[:-1]
                length = str(len(data))
                if self.command == "HEAD":
                    length = answer.headers.get("Content-Length", length)
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in HOP_HEADERS:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if fault == "cut":
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on  # noqa: N815

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fault(self, path: str) -> int | str | None:
        """None passes the request on; a status is answered at once. The answer loses its second
        half and the connection for "cut", its last byte for "short"; for "whole" no range is
        heard."""
        raise NotImplementedError

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def use_store(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Let s3:// mean the store behind `url`, with short first waits and a cache of its own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(transient, "FIRST_WAIT_S", 0.001)
