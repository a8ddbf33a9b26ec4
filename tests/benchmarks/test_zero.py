"""`benchmarks/zero.py` runs two ranks with DDP and with the engine, and measures both."""

import json
from pathlib import Path

import pytest
from tiny_world import ROOT, run_command


@pytest.mark.slow
def test_ddp_and_a_stage_are_measured_side_by_side(tmp_path: Path) -> None:
    results = tmp_path / "zero.json"
    words = [f"{ROOT}/benchmarks/zero.py", "--model", "tiny", "--side", "64", "--steps", "2"]
    ways = ["--way", "DDP", "--way", "ZeRO 3+all"]
    done = run_command(*words, *ways, "--json", str(results), seconds=900)
    assert done.returncode == 0, done.stderr
    assert "0.2 M parameters, all trained" in done.stdout
    found = json.loads(results.read_text())
    assert list(found) == ["DDP", "ZeRO 3+all"]
    for figures in found.values():
        assert figures["steps"] > 0 and figures["seconds"] > 0
    # Five copies of 0.2 M numbers and a few images: what is predicted is small, and not nothing.
    assert 2e6 < found["ZeRO 3+all"]["predicted"] < 1e8
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["DDP", "ZeRO 3+all"]
