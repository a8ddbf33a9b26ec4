"""Writing a page: whole, whoever else writes it, and a clear word where that cannot be."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.report.document import publish


def test_a_page_is_written_into_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.html"
    assert publish(path, "first") == path
    publish(path, "second")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_two_writers_at_once_leave_the_whole_page_of_one(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    pages = ["a" * 300_000, "b" * 500_000]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda place: publish(path, pages[place % 2]), range(60)))
    assert path.read_text() in pages and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"page\.html could not be written .*name a file"):
        publish(tmp_path / "file" / "page.html", "page")
    with pytest.raises(StorageError, match="is a folder"):
        publish(tmp_path, "page")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match="No space left on device"):
        publish(tmp_path / "page.html", "page")
    assert [one.name for one in tmp_path.iterdir()] == ["file"], "nothing half-written is left"
