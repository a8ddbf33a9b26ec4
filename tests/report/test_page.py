"""The report page: what it says, and that it stands alone."""

import json
import re
from pathlib import Path

import pytest
from drawn_runs import write_evaluation, write_metrics, write_recipe
from page_reader import read_page

from pipeline.errors import DataError
from pipeline.report.page import write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "fine_tune"
    write_recipe(run_dir, 60)
    write_metrics(run_dir, 60, 60, extra=True)
    for step, skill in ((20, 0.2), (40, 0.5), (60, 0.95)):
        write_evaluation(run_dir, step, skill)
    return run_dir


def test_a_finished_run(finished: Path) -> None:
    path = write_report(finished)
    assert path == finished / "report.html"
    source, text = read_page(path)
    results = json.loads((finished / "results.json").read_text())
    assert "complete" in text and "60 steps" in text
    assert "optimiser steps" in text and "0.12 of imagenet_lvis, 3.00 of lvis" in text
    for key in ("AP", "APr", "APc", "APf"):
        assert f"{results[key]:.3f}" in text
    assert "federated, IoU 0.50:0.95, top 300" in text
    for heading in ("Categories", "Examples", "Class", "Semantic", "Where the time goes"):
        assert heading in text
    assert "AP by frequency group over steps" in source
    assert source.count("data:image/jpeg;base64,") == 6
    assert "striped &lt;thing&gt;" in source and "<thing>" not in source
    assert "extra (image-level) stream are drawn dashed" in text
    assert not [*finished.glob("*.partial"), *finished.glob(".*.partial")]


def test_every_category_is_a_mark_that_tells_its_name(finished: Path) -> None:
    source, _ = read_page(write_report(finished))
    marks = re.findall(r'<path class="mark (\w+)" d="[^"]*"><title>([^<]*)</title>', source)
    rows = (finished / "evaluations" / "step_00000060" / "per_category.csv").read_text()
    defined = [line for line in rows.splitlines()[1:] if line.split(",")[7]]
    assert len(marks) == len(defined) > 20
    assert {style for style, _ in marks} == {"rare", "common", "frequent"}
    assert all(re.search(r": AP 0\.\d+|: AP 1\.000", title) for _, title in marks)


def test_rare_boxes_are_red(finished: Path) -> None:
    source, _ = read_page(write_report(finished))
    folder = finished / "evaluations" / "step_00000060"
    examples = json.loads((folder / "examples.json").read_text())
    boxes = [box for one in examples for box in one["detections"]]
    rare = sum(box["frequency"] == "r" for box in boxes)
    assert 0 < rare < len(boxes)
    assert source.count('class="found rare"') == rare
    assert source.count('class="found"') == len(boxes) - rare


def test_one_evaluation_gives_bars(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", 5, 0.9)
    source, text = read_page(write_report(tmp_path / "run"))
    assert "AP by frequency group" in source and "over steps" not in source
    assert "There is no metrics.jsonl yet" in text and "The recipe is not shown" in text


def test_a_run_without_evaluation_that_is_still_going(tmp_path: Path) -> None:
    run_dir = tmp_path / "pretrain"
    write_recipe(run_dir, 500)
    write_metrics(run_dir, 30, 500)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 31, "lo')
    _, text = read_page(write_report(run_dir))
    assert "not finished" in text and "step 30 of 500" in text
    assert "has not been evaluated" in text and "left out: 1" in text


def test_an_evaluation_that_is_not_published_is_not_shown(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_evaluation(run_dir, 5, 0.9)
    write_evaluation(run_dir, 9, 0.9)
    (run_dir / "evaluations" / "step_00000009" / "results.json").unlink()
    source, _ = read_page(write_report(run_dir))
    assert "Evaluation at step 5" in source


def test_figures_that_are_not_numbers(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_recipe(run_dir, 10)
    lines = [
        {"event": "step", "step": 1, "loss": float("nan"), "loss/class": None, "seconds": 1.0},
        {"event": "step", "step": 2, "loss": 3.0, "loss/class": 3.0, "seconds": 1.0},
        {"event": "step", "step": 2, "loss": 2.0, "loss/class": 2.0, "seconds": 1.0},
        {"event": "evaluation", "step": 2, "AP": 0.5, "APr": None},
        {"event": "else", "step": 2, "anything": 1},
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    source, text = read_page(write_report(run_dir))
    assert "total, step 2: 2" in source and "step 2: 3" not in source
    assert "0.500" in text and "2 s" in text


def test_lines_that_stand_for_many_steps(tmp_path: Path) -> None:
    """Seconds are means since the line before; windows of both streams are not drawn apart."""
    run_dir = tmp_path / "run"
    write_recipe(run_dir, 100)
    event = {"event": "step", "loss": 1.0, "seconds": 2.0, "data_wait": 0.5, "teacher_wait": 0.0}
    lines = [
        event | {"step": step, "stream": stream, "samples": {"a": 25}}
        for step, stream in ((25, "train"), (50, "extra"), (75, "train"), (100, "extra"))
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    source, text = read_page(write_report(run_dir))
    assert "200 s" not in text and "3 min" in text  # 100 steps of 2 seconds
    assert "waiting for data: 25.0%" in source
    assert 'class="line c1 dashed"' not in source


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        write_report(tmp_path / "nothing")
    with pytest.raises(DataError, match="neither recipe"):
        write_report(tmp_path)
