"""A static HTTP server with ranges and a latency, for `benchmarks/stream.py`, as lean as may be.

    python benchmarks/range_server.py FOLDER [--latency 0.03]

prints its port, then answers GET and HEAD of files under FOLDER, each after the latency.
"""

import argparse
import asyncio
import os
import re
from pathlib import Path
from urllib.parse import unquote


async def answer(
    folder: Path, latency: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer the requests of one connection, one after the other."""
    while request := await reader.readline():
        method, target, _ = request.decode().split(" ", 2)
        wanted = None
        while (line := await reader.readline()).strip():
            if found := re.match(rb"range: bytes=(\d+)-(\d+)", line, re.IGNORECASE):
                wanted = int(found[1]), int(found[2])
        await asyncio.sleep(latency)
        path = folder / unquote(target).lstrip("/")
        if not path.is_file():
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            continue
        size = path.stat().st_size
        start, last = wanted or (0, size - 1)
        last = min(last, size - 1)
        head = [
            f"HTTP/1.1 {'206 Partial Content' if wanted else '200 OK'}",
            f"Content-Length: {last - start + 1}",
            "Accept-Ranges: bytes",
            "Content-Type: application/octet-stream",
        ]
        if wanted:
            head.append(f"Content-Range: bytes {start}-{last}/{size}")
        writer.write(("\r\n".join(head) + "\r\n\r\n").encode())
        if method != "HEAD":
            descriptor = os.open(path, os.O_RDONLY)
            writer.write(os.pread(descriptor, last - start + 1, start))
            os.close(descriptor)
        await writer.drain()
    writer.close()


async def serve(folder: Path, latency: float) -> None:
    """Serve until the process is ended."""
    server = await asyncio.start_server(
        lambda reader, writer: answer(folder, latency, reader, writer), "127.0.0.1", 0
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.03)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.folder, arguments.latency))
