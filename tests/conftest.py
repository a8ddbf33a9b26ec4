"""Fixtures shared by the whole suite."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# The suite is about CPUs, on machines with a GPU too; DeepSpeed reads this when it is imported.
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs and annotations beside the checkout; absent in most places."""
    given = os.environ.get("LONGTAIL_SHARED_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (path / "PROVENANCE.md").is_file():
        pytest.skip(f"no real sample data at {path}; set LONGTAIL_SHARED_DATA to its folder")
    return path


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what a module's tests share; removed after them, since runs fill disks."""
    path = tmp_path_factory.mktemp("module")
    yield path
    shutil.rmtree(path, ignore_errors=True)
