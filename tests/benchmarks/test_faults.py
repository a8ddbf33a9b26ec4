"""benchmarks/faults.py: one fault end to end, and a table that says what was found."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The program as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_hides_nothing(faults) -> None:  # type: ignore[no-untyped-def]
    good = {
        "survived": True, "lost": 0, "repeated": 0, "redone": 2, "differing": 0, "seconds": [5.4],
        "commands": 1, "equal": True,
    }  # fmt: skip
    results = {
        "worker_killed": good,
        "sigterm": {**good, "lost": 3, "equal": False},
        "rank_hangs": {"not_available": "no such key"},
        "half_written": {**good, "differing": 1},
        "store_gone": {"survived": False, "notes": ["AssertionError"]},
    }
    assert [faults.passed(found) for found in results.values()] == [True, False, True, False, False]
    assert not faults.passed({**good, "repeated": 1})
    _, _, *rows = faults.markdown(results).splitlines()
    assert [row.split(" | ")[1].rstrip(" |") for row in rows] == [
        "yes", "yes", "not run: no such key", "yes", "no",
    ]  # fmt: skip
    assert rows[0].endswith("| 0 | 0 | 2 | 5 | 1 | yes |")
    assert rows[1].endswith("| 3 | 0 | 2 | 5 | 1 | NO |")
    assert rows[3].endswith("| 0 | 0 | 2 (1 NOT THE SAME) | 5 | 1 | yes |")


def test_every_row_stands_in_the_catalogue(faults) -> None:  # type: ignore[no-untyped-def]
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [row.name for row in faults.ROWS if f"`{row.name}`" not in page] == []


@pytest.mark.slow
def test_a_killed_worker_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/faults.py", "--work", str(tmp_path), "--only"]
    program = psutil.Popen(
        [*command, "worker_killed"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = program.communicate(timeout=1500)
    except subprocess.TimeoutExpired:
        # The training is in a session of its own and would stay.
        for process in (*program.children(recursive=True), program):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        raise
    assert program.returncode == 0, said
    found = json.loads((tmp_path / "results.json").read_text())["worker_killed"]
    assert found["survived"] and found["equal"] and found["sha256"]
    assert found["lost"] == found["repeated"] == found["differing"] == 0
    assert found["attempts"] >= 2
    assert "| worker killed | yes | 0 | 0 |" in said
