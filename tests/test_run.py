"""The main job on the tiny world: two stages, end to end, through Ray."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "tests" / "recipes"
STAGES = (RECIPES / "tiny_pretrain.yaml", RECIPES / "tiny.yaml")


def longtail(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(module_path: Path) -> Path:
    """A working directory in which both tiny stages have run."""
    result = longtail("run", *STAGES, cwd=module_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (module_path / "stdout.txt").write_text(result.stdout)
    (module_path / "stderr.txt").write_text(result.stderr)
    return module_path


pytestmark = pytest.mark.slow


def test_the_run_directory_is_complete(finished: Path) -> None:
    run = finished / "runs" / "tiny"
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "results.json", "report.html"):
        assert (run / name).is_file(), name
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 8
    for key in ("AP", "AP50", "APr", "APc"):
        assert 0.0 <= results[key] <= 1.0
    with (run / "evaluations" / "step_00000008" / "per_category.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 9))
    assert {event["stream"] for event in steps} == {"train", "extra"}
    assert all(event["loss/semantic"] > 0 for event in steps)
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert [event["step"] for event in evaluations] == [3, 6, 8]
    assert ["subset" in event for event in evaluations] == [True, True, False]
    consumed = [sum(event["consumed"]["samples"].values()) for event in evaluations]
    assert consumed == [12, 24, 32]


def test_it_prints_the_table_and_where_the_report_is(finished: Path) -> None:
    printed = (finished / "stdout.txt").read_text()
    assert "APr" in printed
    assert printed.rstrip().splitlines()[-1].startswith("report: ")
    assert "runs/tiny/report.html" in printed
    logged = (finished / "stderr.txt").read_text()
    assert "evaluation at step 3: AP 0." in logged and "evaluation at step 6: AP 0." in logged
    assert "initialised from runs/tiny_pretrain" in logged


def test_the_second_stage_started_from_the_first(finished: Path) -> None:
    """Eight small steps move weights little, so the stages' backbones are near one another."""
    first = finished / "runs/tiny_pretrain/checkpoints/step_00000008/weights.safetensors"
    second = finished / "runs/tiny/checkpoints/step_00000008/weights.safetensors"
    before, after = load_file(first), load_file(second)
    shared = [name for name in before if "backbone" in name and before[name].ndim == 4]
    assert shared
    for name in shared:
        moved = (after[name] - before[name]).norm() / before[name].norm()
        assert moved < 0.5, f"{name} moved by {moved:.2f} of its norm"
    rows = [name for name in before if name.endswith("text_embeddings")]
    assert rows and all(before[name].shape[0] != after[name].shape[0] for name in rows)


def test_run_again_says_what_is_done_and_changes_nothing(finished: Path) -> None:
    files = sorted((finished / "runs").rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    again = longtail("run", *STAGES, cwd=finished)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("training: done already") == 2
    assert "evaluation: done already" in again.stdout
    assert before == [file.stat().st_mtime_ns for file in files]


def test_the_exported_student_holds_neither_teacher_nor_branch(finished: Path) -> None:
    trained = load_file(finished / "runs/tiny/checkpoints/step_00000008/weights.safetensors")
    assert any(name.startswith("branch.") for name in trained), "the branch was trained"
    optimizer = load_file(finished / "runs/tiny/checkpoints/step_00000008/optimizer.safetensors")
    students = {name.split("/", 1)[1] for name in optimizer if "/" in name}
    assert students and all(name.startswith(("detector.", "branch.")) for name in students)
    result = longtail("export", RECIPES / "tiny.yaml", "-o", "exported", cwd=finished)
    assert result.returncode == 0, result.stderr
    exported = load_file(finished / "exported" / "weights.safetensors")
    assert exported and all(name.startswith("detector.") for name in exported)
    refused = longtail("export", RECIPES / "tiny.yaml", "-o", "exported", cwd=finished)
    assert refused.returncode == 74 and "exists already" in refused.stderr


def test_figures_belong_to_the_way_they_were_made(finished: Path) -> None:
    """Another way to evaluate evaluates again; the checkpoint is the same."""
    again = longtail("run", *STAGES, "evaluation.max_detections=100", cwd=finished)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("training: done already") == 2
    assert "evaluation: done already" not in again.stdout
    assert "(at most 100 per image were given)" in again.stdout


def test_sigterm_before_training_ends_with_75(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", *map(str, STAGES)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("== tiny_pretrain")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert "stopped on request" in errors and "Traceback" not in errors
    assert not list(tmp_path.rglob("step_*")), "it stopped before it trained"


def test_a_changed_recipe_does_not_continue_the_old_run(finished: Path) -> None:
    result = longtail("run", *STAGES, "training.learning_rate=1e-3", cwd=finished)
    assert result.returncode == 78
    assert "learning_rate" in result.stderr
    assert "Traceback" not in result.stderr
