"""The benchmark of evaluators runs, and they agree on what it draws."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "lvis_eval.py"


@pytest.mark.slow
def test_all_evaluators_agree_on_a_small_part() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--scales", "400", "--no-full", "--read"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.split("1/400: 49 images, ")[1].splitlines()[1:]
    assert head.split()[-1] == "difference"
    assert [row.split("  ")[0] for row in rows] == ["lvis 0.5.3", "faster-coco-eval", "longtail"]
    assert "json read in" in rows[2]
    differences = [float(row.split("(")[0].split()[-1]) for row in rows[1:]]
    assert max(differences) < 1e-9, done.stdout
