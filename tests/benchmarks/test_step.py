"""The benchmarks of the training step run, and say what they measured."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, BENCHMARKS / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


PEER = """
import torch
from torch import nn

from step import Subject


def subject(case):
    model = nn.Linear(case.width, case.height)
    return Subject(model, lambda: model(torch.ones(case.batch, case.width)).sum(), {})
"""


@pytest.mark.slow
def test_every_subject_has_a_row_and_ours_a_share_for_each_part(tmp_path: Path) -> None:
    (tmp_path / "peer.py").write_text(PEER)
    text = run(
        "step.py",
        *("--case", "96x64:1", "--repeats", "1", "--subjects", "longtail,longtail_richsem"),
        *("--peer", str(tmp_path / "peer.py")),
    )
    _, table = text.split("96x64, batch 1\n")
    rows = {line.split()[0]: line for line in table.splitlines()[1:4]}
    assert list(rows) == ["longtail", "longtail_richsem", "peer"]
    assert rows["longtail"].count("1.00x") == 2 and "47.7 M" in rows["longtail"]
    assert "share of the step, longtail_richsem: backbone" in table and "branch" in table


@pytest.mark.slow
def test_steps_of_a_gpu_can_be_tried_on_a_cpu(tmp_path: Path) -> None:
    text = run(
        "gpu_step.py",
        *("--device", "cpu", "--backbones", "resnet18,nonsense", "--batches", "1"),
        *("--size", "96x64", "--repeats", "1", "--precisions", "float32", "--kernels", "auto"),
        *("--tflops", "0.1", "--bandwidth", "0.01"),
    )
    _, good, bad = text.splitlines()
    floor = float(good.split("floor")[1].split("ms")[0])
    assert 0 < floor and "backward" in good
    assert "RecipeError" in bad
