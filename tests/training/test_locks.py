"""A run directory that cannot be taken: an error of the storage, on all ranks, at once."""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tiny_world import tiny_recipe

from pipeline.errors import StorageError
from pipeline.training.agreement import on_first_rank
from pipeline.training.log import RunLog
from pipeline.training.loop import join_process_group, open_run_dir
from pipeline.training.samples import open_samples


def put_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def put_folder(path: Path) -> None:
    path.mkdir(parents=True)


@pytest.mark.parametrize(("put", "name"), [(put_file, "."), (put_folder, ".lock")])
def test_a_run_directory_that_cannot_be_written(
    tmp_path: Path, put: Callable[[Path], None], name: str
) -> None:
    recipe = tiny_recipe(tmp_path, "barred")
    put(recipe.run_dir / name)
    join_process_group(torch.device("cpu"))
    with ExitStack() as stack, pytest.raises(StorageError) as caught:
        on_first_rank(lambda: open_run_dir(recipe, stack))
    assert caught.value.exit_code == 74
    assert f"{recipe.run_dir}/.lock could not be written" in str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", ".metrics_lock", "environment.json"])
def test_a_log_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    recipe = tiny_recipe(tmp_path, "barred")
    put_folder(recipe.run_dir / name)
    join_process_group(torch.device("cpu"))
    with pytest.raises(StorageError, match=rf"{name} could not be"):
        RunLog(recipe, 0)


def test_the_log_says_which_terms_a_source_has_none_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inet = {"name": "inet", "format": "imagenet21k", "images": "x", "use_labels": False}
    recipe = tiny_recipe(tmp_path, "hard", semantic={"labels": "hard"}, data={"extra": [inet]})
    join_process_group(torch.device("cpu"))
    with caplog.at_level("INFO"), RunLog(recipe, 0):
        [told] = [line for line in caplog.messages if line.startswith("source ")]
    assert told.startswith("source inet: no class or semantic term, for semantic.labels hard")


def test_a_ledger_that_cannot_be_read(tmp_path: Path) -> None:
    put_folder(tmp_path / "samples_rank0.jsonl")
    join_process_group(torch.device("cpu"))
    with pytest.raises(StorageError, match=r"samples_rank0\.jsonl could not be read"):
        open_samples(tmp_path, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    recipe = tiny_recipe(tmp_path, "lustre")
    monkeypatch.setattr(fcntl, "flock", flock)
    with ExitStack() as stack, pytest.raises(StorageError) as caught:
        open_run_dir(recipe, stack)
    said = str(caught.value)
    assert f"{recipe.run_dir}/.lock could not be locked" in said and os.strerror(number) in said
    assert "option flock" in said and "the same command" in said
