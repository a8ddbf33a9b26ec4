"""The benchmark of deformable attention runs and names every way that is here."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "deformable_attention.py"


@pytest.mark.slow
def test_every_way_has_a_row_for_each_scene() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--threads", "1", "--repeat", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "no kernel was compiled" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    _, encoder, decoder = done.stdout.split("\n\n")
    for table, scene in ((encoder, "encoder, 1 thread"), (decoder, "decoder, 1 thread")):
        title, _, *rows = table.strip().splitlines()
        names = [row.split()[0] for row in rows if not row.startswith("transformers")]
        assert title == scene and names == ["autograd", "portable", "compiled"]
