"""A web server on the loopback address that serves a folder, with faults when told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class FaultyServer:
    """`faults` are taken one by one: a status code, "cut", "short", "hold", or "html"."""

    folder: Path
    faults: list[int | str] = field(default_factory=list)
    forever: int | str | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def next_fault(self) -> int | str | None:
        return self.faults.pop(0) if self.faults else self.forever


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
            fault = server.next_fault()
            path = folder / self.path.lstrip("/")
            if isinstance(fault, int):
                self.send_error(fault)
            elif fault == "hold":
                server.released.wait(30)
                self.close_connection = True
            elif fault == "html":
                self.answer(b"<html>please log in</html>" * 400)
            elif not path.is_file():
                self.send_error(404)
            else:
                self.answer(path.read_bytes(), fault)

        def answer(self, data: bytes, fault: int | str | None = None) -> None:
            asked = self.headers.get("Range")
            if asked and data:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                whole, data = len(data), data[int(first) : int(last) + 1]
                if not data:
                    self.send_error(416)
                    return
                self.send_response(206)
                end = int(first) + len(data) - 1
                self.send_header("Content-Range", f"bytes {first}-{end}/{whole}")
            else:
                self.send_response(200)
            half = len(data) // 2
            self.send_header("Content-Length", str(half if fault == "short" else len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault in ("cut", "short"):
                self.wfile.write(data[:half])
                self.close_connection = True
            else:
                self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            http.shutdown()
            thread.join()
