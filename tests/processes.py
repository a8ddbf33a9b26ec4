"""Processes below another one, and where they listen."""

from contextlib import suppress

import psutil


def descendants(pid: int, title: str) -> list[int]:
    """Processes below `pid` with `title` in their command line."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def listening_addresses(pid: int) -> set[str]:
    """The addresses on which `pid` and the processes below it accept connections by TCP."""
    own = psutil.Process(pid)
    found = set()
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found
