"""A disk that is full while a checkpoint is saved: waited for, then refused, and nothing harmed."""

import errno
import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from test_checkpoint import make_recipe, save_steps
from toy_student import run_ranks

from pipeline.errors import StorageError
from pipeline.training import space
from pipeline.training.agreement import on_first_rank
from pipeline.training.checkpoint import load_state
from pipeline.training.manifest import (
    newest_verified,
    request_evaluation,
    verify,
    write_atomically,
)
from pipeline.training.metrics import SinkFeed, append_event
from pipeline.training.space import append_line, with_room
from pipeline.training.whereabouts import here


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB, as root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system takes root and a kernel that mounts tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "WAITS_S", (0.2, 0.2, 0.2, 30.0))


def fill(place: Path) -> Path:
    filler = place / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return filler


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_old_checkpoint_and_the_save_is_tried_again(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [old] = save_steps(small_disk, 1)
    before, filler = contents(old), fill(small_disk)
    partial = small_disk / "run" / "checkpoints" / ".step_00000009.ab.tmp"
    monkeypatch.setattr(space, "WAITS_S", (0.1, 0.1))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(StorageError, match=r"step_00000002 needs .* has \d+ bytes free, tried 3"),
    ):
        save_steps(small_disk, 2)
    assert caplog.text.count("no space left") == 2 and "trying again in 0.1 s" in caplog.text
    assert contents(old) == before and newest_verified(small_disk / "run") == old
    assert [path.name for path in old.parent.iterdir()] == [old.name]

    monkeypatch.setattr(space, "WAITS_S", (0.5, 30.0, 30.0))
    room = threading.Timer(0.2, filler.unlink)
    room.start()
    [new] = save_steps(small_disk, 2)
    room.join()
    assert verify(new).step == 2 and load_state(new).updates == 3
    assert contents(old) == before and not partial.exists()


def test_lines_of_the_log_wait_for_room_and_are_whole(small_disk: Path) -> None:
    append_event(small_disk, "step", 1, {"loss": 1.0})
    filler, line = fill(small_disk), "x" * 9000
    room = threading.Timer(0.3, filler.unlink)
    room.start()
    append_line(small_disk / "metrics.jsonl", line)
    room.join()
    first, second = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert first.startswith('{"event": "step"') and second == line


def test_a_run_that_writes_its_small_files_waits_for_room(small_disk: Path) -> None:
    recipe = make_recipe(small_disk, logging={"tensorboard": False})
    recipe.run_dir.mkdir()
    feed = SinkFeed(recipe)
    append_event(recipe.run_dir, "step", 1, {"loss": 1.0})
    for write in (feed.pass_on, lambda: write_atomically(recipe.run_dir / "x", "y" * 5000)):
        room = threading.Timer(0.3, fill(small_disk).unlink)
        room.start()
        write()
        room.join()
    assert (recipe.run_dir / "x").read_text() == "y" * 5000


def test_a_line_comes_after_one_that_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "one")
    with path.open("a") as file:
        file.write("tw")
    append_line(path, "three")
    assert path.read_text() == "one\ntw\nthree\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_quota_counts_as_a_full_disk_and_other_errors_do_not(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "WAITS_S", (0.0, 0.0))
    tries = []

    def refuse(number: int) -> None:
        tries.append(number)
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageError, match=r"no space left: .*x needs 2\.0 MB") as caught:
        with_room(tmp_path / "x", 2_000_000, lambda: refuse(number))
    assert len(tries) == 3 and caught.value.exit_code == 74
    with pytest.raises(StorageError, match=r"x could not be written: .*Input/output error"):
        with_room(tmp_path / "x", 1, lambda: refuse(errno.EIO))
    assert len(tries) == 4


def test_a_disk_that_takes_no_writes_any_more_is_a_fault_of_storage(small_disk: Path) -> None:
    [old] = save_steps(small_disk, 1)
    run_dir, before = small_disk / "run", contents(small_disk)
    writes = (
        lambda: append_event(run_dir, "step", 2, {"loss": 1.0}),
        lambda: append_line(run_dir / "samples_rank0.jsonl", "x"),
        lambda: write_atomically(run_dir / "not_finite" / "x", "y"),
        lambda: request_evaluation(run_dir / "checkpoints" / "step_00000002"),
        lambda: save_steps(small_disk, 2),
    )
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True, capture_output=True)
    begun = time.monotonic()
    for write in writes:
        with pytest.raises(StorageError, match=r"could not be written: .*Read-only file system"):
            write()
    assert time.monotonic() - begun < min(space.WAITS_S[3:])
    assert contents(small_disk) == before and newest_verified(run_dir) == old


def _save_on_full(place: str) -> str:
    space.WAITS_S = (0.2, 0.2)
    begun = time.monotonic()
    try:
        on_first_rank(lambda: save_steps(Path(place), 2))
    except StorageError as error:
        assert time.monotonic() - begun < 60
        return f"{dist.get_rank()}: {error}"
    return "saved"


@pytest.mark.slow
def test_all_ranks_learn_that_there_is_no_room(small_disk: Path) -> None:
    save_steps(small_disk, 1)
    fill(small_disk)
    said = run_ranks(_save_on_full, 2, str(small_disk))
    assert [text[:2] for text in said] == ["0:", "1:"] and said[0][2:] == said[1][2:]
    assert "no space left" in said[0]


def test_each_try_is_progress_for_whoever_watches(tmp_path: Path) -> None:
    begun: list[float] = []

    def attempt() -> None:
        begun.append(here.note().since)
        if len(begun) < 3:
            raise OSError(errno.ENOSPC, "full")

    with_room(tmp_path / "file", 1, attempt)
    assert begun[1] - begun[0] >= 0.2 and begun[2] - begun[1] >= 0.2
