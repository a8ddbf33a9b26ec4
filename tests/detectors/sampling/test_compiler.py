"""The kernel is compiled once for a machine, and where it cannot be, sampling goes on without."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.detectors.sampling import compiler
from pipeline.detectors.sampling.compiler import Kernel

SAMPLE = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s")
logging.getLogger("pipeline").setLevel(logging.INFO)
import torch
from pipeline.detectors.sampling import kernel_in_use, portable, sample_and_sum
torch.manual_seed(0)
value = torch.randn(1, 12, 2, 16, requires_grad=True)
locations, weights = torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3)
for _ in range(2):
    output = sample_and_sum(value, [(3, 4)], locations, weights)
    output.sum().backward()
expected = portable.sample_and_sum(value, [(3, 4)], locations, weights)
torch.testing.assert_close(output, expected)
print(kernel_in_use(torch.device("cpu")))
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache in the place of the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def built(cache: Path) -> Path:
    """The library in the cache, just compiled."""
    found = load()
    if not isinstance(found, Kernel):
        pytest.skip(f"no kernel was compiled: {found}")
    (path,) = cache.iterdir()
    assert path.suffix == ".so"
    return path


def load() -> Kernel | str:
    """As a new process does."""
    return compiler.load_kernel.__wrapped__()


def test_the_second_process_takes_what_the_first_compiled(built: Path) -> None:
    before = built.stat().st_mtime_ns
    assert isinstance(load(), Kernel)
    assert [path.stat().st_mtime_ns for path in built.parent.iterdir()] == [before]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_library_is_compiled_again(built: Path, damage: str) -> None:
    good = built.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    built.unlink()  # The process has it mapped.
    built.write_bytes({"truncated": good[:middle], "flipped": flipped, "empty": b""}[damage])
    assert compiler._cached(built.parent, built.name) is None
    assert isinstance(load(), Kernel)
    sound = [p for p in built.parent.iterdir() if p == compiler._cached(built.parent, p.name)]
    assert len(sound) == 1


@pytest.mark.parametrize(
    ("variable", "setting", "reason"),
    [
        ("CXX", "/bin/false", "/bin/false"),
        ("CXX", "no-such-compiler -O1", "no-such-compiler"),
        ("CXX", 'c++ "-O1', "No closing quotation"),
        ("PATH", "/nonexistent", "no C++ compiler here"),
        (compiler.CACHE_VARIABLE, "/dev/null/cache", "/dev/null"),
    ],
)
def test_what_stands_in_the_way_is_said(
    monkeypatch: pytest.MonkeyPatch, cache: Path, variable: str, setting: str, reason: str
) -> None:
    monkeypatch.setenv(variable, setting)
    found = load()
    assert isinstance(found, str) and reason in found
    assert not cache.exists()


def test_a_library_that_does_not_load(built: Path) -> None:
    """Whole, and of this key, but made for another machine."""
    built.unlink()
    alien = b"\x7fELF of another machine"
    (built.parent / compiler._name(built.name, alien)).write_bytes(alien)
    found = load()
    assert isinstance(found, str) and built.name[:32] in found


def test_options_that_hide_the_functions(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    monkeypatch.setenv("CXX", f"{compiler._compiler()[0]} -fvisibility=hidden")
    found = load()
    assert isinstance(found, str) and "lacks a function" in found


def test_a_cache_in_the_working_directory(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    monkeypatch.chdir(built.parent)
    monkeypatch.setenv(compiler.CACHE_VARIABLE, ".")
    assert isinstance(load(), Kernel)


def test_source_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if isinstance(compiler.load_kernel(), str):
        pytest.skip("no compiler here")
    broken = tmp_path / "kernel.cpp"
    broken.write_text("int broken = ;")
    monkeypatch.setattr(compiler, "SOURCE", broken)
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(compiler.NoKernelError, match=r"exit code 1: .*error"):
        compiler._load()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("change", ["source", "options"])
def test_another_source_or_option_is_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    if isinstance(compiler.load_kernel(), str):
        pytest.skip("no compiler here")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    compiler._load()
    if change == "source":
        (tmp_path / "kernel.cpp").write_bytes(compiler.SOURCE.read_bytes() + b"\n// changed\n")
        monkeypatch.setattr(compiler, "SOURCE", tmp_path / "kernel.cpp")
    else:
        monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-DCHANGED"))
    compiler._load()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_folder_that_others_can_write_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(folder))
    assert compiler._cache_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(compiler.NoKernelError, match="others can write into"):
        compiler._cache_folder()


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    cache.mkdir(mode=0o500)
    found = load()
    assert isinstance(found, str) and str(cache) in found


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(compiler.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler._cache_folder() == tmp_path / "longtail" / "kernels"


@pytest.mark.slow
def test_processes_may_compile_at_once(cache: Path, clean_environment: dict[str, str]) -> None:
    if isinstance(compiler.load_kernel(), str):
        pytest.skip("no compiler here")
    environment = clean_environment | {compiler.CACHE_VARIABLE: str(cache)}
    processes = [start(environment) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0 and output.startswith("compiled here (by "), errors
        assert errors.splitlines() == [f"INFO deformable attention on cpu: {output.strip()}"]
    assert all(path.suffix == ".so" for path in cache.iterdir()), "nothing half done is left"
    assert isinstance(load(), Kernel)


@pytest.mark.slow
def test_without_a_kernel_the_portable_way_is_taken(clean_environment: dict[str, str]) -> None:
    process = start(clean_environment | {"CXX": "/bin/false"})
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.startswith("portable (") and "/bin/false" in output
    assert errors.splitlines() == [f"WARNING deformable attention on cpu: {output.strip()}"]


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SAMPLE],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
