"""Sections of the report that show what newer runs write: each says it, and is absent without."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from drawn_runs import (
    consumed,
    log_evaluation,
    write_environment,
    write_evaluation,
    write_metrics,
    write_recipe,
)
from page_reader import read_page

from pipeline.report.page import write_report
from pipeline.report.run_data import read_run, subset_of

NEW = ("The same detections by protocol", "Operating point", "Precision and recall", "Memory")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    write_recipe(path, 40)
    write_metrics(path, 40, 40)
    write_evaluation(path, 40, 0.8)
    return path


def results_of(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    path = run_dir / "evaluations" / "step_00000040" / "results.json"
    return path, json.loads(path.read_text())


def change(run_dir: Path, **values: Any) -> None:
    path, results = results_of(run_dir)
    path.write_text(json.dumps(results | values))


def test_all_of_it(run_dir: Path) -> None:
    write_environment(run_dir)
    _, text = read_page(write_report(run_dir))
    for heading in (*NEW, "Environment"):
        assert heading in text


def test_a_run_of_before_has_none_of_it(run_dir: Path) -> None:
    path, results = results_of(run_dir)
    for key in ("protocols", "operating_point"):
        results.pop(key, None)
    path.write_text(json.dumps(results))
    path.with_name("curves.json").unlink(missing_ok=True)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("memory_gb"), line.pop("gpu_memory_gb")
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, text = read_page(write_report(run_dir))
    for heading in (*NEW, "Environment", "Consumed"):
        assert heading not in text
    assert "Average precision" in text and "Throughput" in text


def test_each_protocol_has_its_own_row(run_dir: Path) -> None:
    _, results = results_of(run_dir)
    protocols = {
        "300": {"protocol": results["protocol"], "AP": 0.111, "APr": None},
        "1000": {"protocol": "LVIS box AP, top 1,000", "AP": 0.222, "APr": 0.333},
        "fixed": {"protocol": "LVIS box AP, fixed", "AP": 0.444, "APr": float("nan")},
    }
    change(run_dir, protocols=protocols)
    source, _ = read_page(write_report(run_dir))
    rows = re.findall(r"<tr><td><b>(.*?)</tr>", source)
    assert [re.sub(r"<[^>]*>", " ", row).split()[0:4] for row in rows] == [
        ["top", "300", "per", "image"],
        ["top", "1,000", "per", "image"],
        ["fixed", "AP", "LVIS", "box"],
    ]
    assert "0.111" in rows[0] and "(above)" in rows[0]
    assert "0.222" in rows[1] and "0.333" in rows[1] and "(above)" not in rows[1]
    assert "0.444" in rows[2] and "nan" not in rows[2].lower() and "(above)" not in rows[2]


def test_the_operating_point_states_both_thresholds(run_dir: Path) -> None:
    point = {"score_threshold": 0.307, "iou_threshold": 0.5, "precision": 0.61, "recall": 0.29}
    change(run_dir, operating_point=point | {"mean_iou": None, "detections": 1234})
    _, text = read_page(write_report(run_dir))
    assert "score at least 0.307" in text and "IoU 0.50 or more" in text
    for shown in ("0.610", "0.290", "1,234"):
        assert shown in text


def test_precision_is_drawn_at_its_recall(run_dir: Path) -> None:
    recall = [place / 100 for place in range(101)]
    falling = [1 - value / 2 for value in recall]
    curves = {
        "recall": recall,
        "precision": {
            "all": {"0.50": falling, "0.75": None, "0.50:0.95": [-1.0] * 101},
            "r": None,
            "c": {"0.50": [None, *falling[1:]]},
            "f": {},
        },
    }
    path, _ = results_of(run_dir)
    path.with_name("curves.json").write_text(json.dumps(curves))
    source, text = read_page(write_report(run_dir))
    assert "All categories, by IoU threshold" in text and "IoU 0.75" not in text
    lines = re.findall(r'points="([^"]*)" data-x="recall" data-at="([^"]*)"', source)
    assert [len(words.split(";")) for _, words in lines] == [101, 100, 101]
    first, last = (
        [float(number) for number in lines[0][0].split()[place].split(",")] for place in (0, -1)
    )
    assert lines[0][1].startswith("0|1;") and lines[0][1].endswith(";1|0.5")
    assert first[0] < last[0] and first[1] < last[1], "higher recall, lower precision"


@pytest.mark.parametrize("text", ["[]", "{", '{"precision": 3}', '{"precision": {"all": [1]}}'])
def test_curves_that_are_not_curves(run_dir: Path, text: str) -> None:
    path, _ = results_of(run_dir)
    path.with_name("curves.json").write_text(text)
    _, shown = read_page(write_report(run_dir))
    assert "Precision and recall" not in shown
    assert ("could not be read" in shown) == (text in ("[]", "{"))


def test_what_was_consumed_at_each_evaluation(run_dir: Path) -> None:
    log_evaluation(run_dir, 20, 0.1, consumed=consumed(1000))
    log_evaluation(run_dir, 40, 0.1, consumed=consumed(2000))
    source, _ = read_page(write_report(run_dir))
    table = source[source.index("<h2>Consumed") :]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", table)]
    newest, oldest = rows[1], rows[2]
    assert newest[0] == "40" and newest[3:] == ["1,000", "2,000", "3,000", "40", "1,000", "14,000"]
    assert oldest[0] == "20" and oldest[3:] == ["500", "1,000", "1,500", "20", "500", "7,000"]
    assert newest[1] == f"{results_of(run_dir)[1]['AP']:.3f}", "figures are those of results.json"


def test_a_subset_is_never_joined_to_all_images(run_dir: Path) -> None:
    for step in (10, 20, 30):
        log_evaluation(run_dir, step, 0.9, subset="5 of 30 images")
    log_evaluation(run_dir, 35, 0.2)
    log_evaluation(run_dir, 40, 0.99, subset="5 of 30 images")
    run = read_run(run_dir)
    assert [(one["step"], subset_of(one)) for one in run.curve if one["step"] >= 35] == [
        (35, None),
        (40, None),
        (40, "5 of 30 images"),
    ]
    assert run.result is not None and run.result["AP"] < 0.9, "the headline is of all images"
    source, text = read_page(write_report(run_dir))
    chart = source[source.index("AP by frequency group over steps") :].split("</svg>")[0]
    lines = dict(re.findall(r'<polyline class="line rare( hollow)?" [^>]*data-at="([^"]*)"', chart))
    assert [word.split("|")[0] for word in lines[" hollow"].split(";")] == ["10", "20", "30", "40"]
    assert [word.split("|")[0] for word in lines[""].split(";")] == ["35", "40"]
    assert source.count('class="dot rare hollow"') >= 4
    assert text.count("5 of 30 images") >= 4


def test_only_a_subset_was_evaluated(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_recipe(run_dir, 40)
    write_metrics(run_dir, 30, 40)
    log_evaluation(run_dir, 10, 0.1, subset="5 of 30 images")
    log_evaluation(run_dir, 20, 0.2, subset="5 of 30 images")
    _, text = read_page(write_report(run_dir))
    assert "Only a subset, 5 of 30 images" in text and "0.200" in text


def test_packages_that_matter_come_first(run_dir: Path) -> None:
    write_environment(run_dir)
    source, text = read_page(write_report(run_dir))
    assert "4 x NVIDIA H200" in text and "open_clip_torch" in text and "&lt;libc&gt;" in source
    folded = source[source.index("Other packages (1)") :]
    assert "tqdm" in folded and "tqdm" not in source[: source.index("Other packages (1)")]
    (run_dir / "environment.json").write_text("{")
    _, text = read_page(write_report(run_dir))
    assert "environment.json could not be read" in text


def test_twenty_of_the_best_and_of_the_worst(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", 5, 0.9, num_categories=300)
    source, _ = read_page(write_report(tmp_path / "run"))
    path = tmp_path / "run" / "evaluations" / "step_00000005" / "per_category.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
    rare = sorted(float(line[7]) for line in lines if line[2] == "r" and line[7])
    for title, expected in (("Best", rare[-20:]), ("Worst", rare[:20])):
        table = source[source.index(f"{title} rare categories") :].split("</table>")[0]
        shown = sorted(float(value) for value in re.findall(r"</span>(\d\.\d{3})</td>", table))
        assert shown == [round(value, 3) for value in expected]
