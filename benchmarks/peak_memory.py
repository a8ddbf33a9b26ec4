"""Run a command and print its time and the most memory that its processes held together.

    python benchmarks/peak_memory.py make quickstart

Counted are all processes that the command started, daemons too, found by a variable in their
environment. Proportional set size divides each shared page among the processes that share it; the
sum of resident sets counts such a page once for each of them.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

INTERVAL_S = 2.0
VARIABLE = "LONGTAIL_MEASURED"


def processes(mark: bytes) -> list[Path]:
    """Folders in /proc of the living processes that carry `mark` in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(folder)
            except OSError:
                continue  # It ended, or belongs to someone else.
    return found


def held_bytes(folder: Path) -> tuple[int, int]:
    """Proportional and resident set size of a process; zero when it has ended."""
    sizes = {"Pss": 0, "Rss": 0}
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] = int(rest.split()[0]) * 1024
    return sizes["Pss"], sizes["Rss"]


def main() -> int:
    """Measure the command that the arguments are."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    token = secrets.token_hex(8)
    mark = f"{VARIABLE}={token}".encode()
    begun = time.monotonic()
    command = subprocess.Popen(sys.argv[1:], env={**os.environ, VARIABLE: token})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The command gets it too and decides.
    signal.signal(signal.SIGTERM, lambda *_: command.terminate())
    peak = peak_resident = most = 0
    while command.poll() is None:
        sizes = [held_bytes(folder) for folder in processes(mark)]
        peak = max(peak, sum(pss for pss, _ in sizes))
        peak_resident = max(peak_resident, sum(rss for _, rss in sizes))
        most = max(most, len(sizes))
        time.sleep(INTERVAL_S)
    print(
        f"{time.monotonic() - begun:.0f} s; at most {most} processes, {peak / 1e9:.2f} GB "
        f"proportional set size, {peak_resident / 1e9:.2f} GB resident (shared pages counted in "
        "each process)"
    )
    return command.returncode


if __name__ == "__main__":
    sys.exit(main())
