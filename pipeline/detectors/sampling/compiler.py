"""Compiles kernel.cpp on the machine that needs it, once, and loads it.

Nothing is compiled when longtail is installed or imported. The library lies in the user's cache,
under a name with a digest of everything that it was made from, the processor's instructions too,
and one of its own bytes: homes are shared between machines, and a damaged library would end the
process when it runs.
"""

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("kernel.cpp")
CACHE_VARIABLE = "LONGTAIL_KERNEL_CACHE"
"""Names another folder than `longtail/kernels` in the user's cache."""
OPTIONS = ("-std=c++17", "-O3", "-pthread", "-shared", "-fPIC")
NATIVE = ("-march=native", "-mcpu=native")
"""For the instructions of this processor; some compilers know one of them only."""
TIMEOUT_S = 300.0


class Kernel(NamedTuple):
    """The library, and the compiler that made it, with its version."""

    library: ctypes.CDLL
    compiler: str


class NoKernelError(Exception):
    """Why there is no library here."""


@cache
def load_kernel() -> Kernel | str:
    """The kernel for this machine, or one sentence on why there is none; tried once a process."""
    try:
        return _load()
    except (NoKernelError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error)
    except AttributeError as error:
        return f"the library lacks a function; options in CXX may hide it: {error}"


def _load() -> Kernel:
    compiler = _compiler()
    options, machine = _native_options(compiler)
    source = SOURCE.read_bytes()
    key = hashlib.sha256()
    for part in (source, machine, " ".join([*compiler, *options]).encode()):
        key.update(hashlib.sha256(part).digest())
    folder = _cache_folder()
    path = _cached(folder, key.hexdigest()) or _build(folder, key.hexdigest(), compiler, options)
    library = ctypes.CDLL(str(path.absolute()))  # A bare name would be looked for elsewhere.
    pointer = ctypes.c_void_p
    library.longtail_sample_forward.argtypes = [pointer] * 2
    library.longtail_sample_backward.argtypes = [pointer] * 5
    library.longtail_sample_forward.restype = library.longtail_sample_backward.restype = None
    return Kernel(library, f"{' '.join(compiler)} {_version(machine)}")


def _compiler() -> list[str]:
    """$CXX with its own options where it is set, or the first of the usual names."""
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NoKernelError(f"CXX is {os.environ['CXX']!r}: {error}") from error
    if given:
        return given
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NoKernelError("no C++ compiler here; install one (c++, g++, clang++) or set CXX")


def _native_options(compiler: list[str]) -> tuple[list[str], bytes]:
    """Options for this processor, and the compiler's own macros under them: they state its version
    and the instructions that it will use."""
    for native in NATIVE:
        options = [*OPTIONS, native]
        command = [*compiler, *options, "-dM", "-E", "-x", "c++", os.devnull]
        done = _run(command)
        if done.returncode == 0 and done.stdout:
            return options, done.stdout
    raise NoKernelError(f"{shlex.join(command)} failed with exit code {done.returncode}")


def _version(macros: bytes) -> str:
    """As the compiler itself says it."""
    text = macros.decode(errors="replace")
    found = re.search(r'^#define __VERSION__ "(.*)"', text, flags=re.MULTILINE)
    return found[1].strip() if found else "of an unknown version"


def _cache_folder() -> Path:
    """A folder that only this user writes: what lies there is executed."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        folder = Path(given)
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "longtail" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoKernelError(
            f"others can write into {folder}; make it yours alone (chmod 700) or name another "
            f"folder in {CACHE_VARIABLE}"
        )
    return folder


def _cached(folder: Path, key: str) -> Path | None:
    """An undamaged library of this key."""
    for path in sorted(folder.glob(f"{key[:32]}-*.so")):
        if path == folder / _name(key, path.read_bytes()):
            return path
    return None


def _name(key: str, library: bytes) -> str:
    return f"{key[:32]}-{hashlib.sha256(library).hexdigest()[:32]}.so"


def _build(folder: Path, key: str, compiler: list[str], options: list[str]) -> Path:
    """Compile to a name of this process's own, then rename: others may be building too."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
        made = Path(scratch) / "kernel.so"
        done = _run([*compiler, *options, str(SOURCE), "-o", str(made)])
        if done.returncode or not made.is_file():
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            said = next((line for line in lines if "error" in line), lines[-1])
            raise NoKernelError(
                f"{' '.join(compiler)} failed with exit code {done.returncode}: {said}"
            )
        path = folder / _name(key, made.read_bytes())
        made.replace(path)
    return path


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=TIMEOUT_S
    )
