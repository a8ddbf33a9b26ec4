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

from pipeline.report.compare import write_comparison
from pipeline.report.page import write_report
from pipeline.report.run_data import points, read_run, subset_of
from pipeline.report.scales import format_number
from pipeline.report.speed import samples_by_source, training_seconds

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


def test_pictures_are_of_the_evaluation_that_the_page_shows(run_dir: Path) -> None:
    write_evaluation(run_dir, 60, 0.2)
    path = run_dir / "evaluations" / "step_00000060" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"subset": "5 of 30 images"}))
    assert read_run(run_dir).evaluations[-1].step == 60
    source, _ = read_page(write_report(run_dir))
    pictures = source[source.index("<h2>Examples") :]
    assert pictures.startswith('<h2>Examples</h2><p class="note">Evaluation at step 40.</p>')
    first, second = (
        {
            f"score {box['score']:.3f}"
            for example in json.loads(file.read_text())
            for box in example["detections"]
        }
        for file in sorted(run_dir.glob("evaluations/*/examples.json"))
    )
    assert set(re.findall(r"score \d\.\d{3}", pictures)) == first != second


def test_names_of_the_ground_truth_stand_below_the_picture(run_dir: Path) -> None:
    path = run_dir / "evaluations" / "step_00000040" / "examples.json"
    example = json.loads(path.read_text())[0]
    named = [("ring_(r)", "r"), ("cup", "f"), ("cup", "f"), *((f"c{n:02}", "c") for n in range(20))]
    boxes = [{"name": n, "frequency": f, "bbox": [9, 9, 30, 30]} for n, f in named]
    path.write_text(json.dumps([example | {"ground_truth": boxes, "image_id": 7}]))
    _, text = read_page(write_report(run_dir))
    words = " ".join(text[text.index("Image 7") :].split())
    assert words.startswith("Image 7, 23 boxes: ring (r) , cup x 2, c00, c01, ")
    assert "c09, and 10 other categories" in words and "c10" not in words


def test_a_picture_that_is_too_low_for_a_name_has_none(run_dir: Path) -> None:
    path = run_dir / "evaluations" / "step_00000040" / "examples.json"
    example = json.loads(path.read_text())[0]
    for height, named in ((example["height"], True), (4, False)):
        path.write_text(json.dumps([example | {"height": height}]))
        source, _ = read_page(write_report(run_dir))
        assert ('<g class="name' in source) == named and 'class="found' in source


def lines_of_a_resumed_run(run_dir: Path, **more: Any) -> None:
    """Stopped after step 57; the line at 60 is of three steps, which took longer."""
    windows = [(s, 10) for s in (10, 20, 30, 40, 50)] + [(57, 7), (60, 3)]
    lines = [
        {"event": "step", "step": step, "seconds": 5.0 if size == 3 else 1.0, "steps": size}
        | {"data_wait": 0.1, "samples": {"a": size * 4}}
        | more
        for step, size in windows
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_time_and_samples_of_a_run_that_was_stopped_between_lines(tmp_path: Path) -> None:
    write_recipe(tmp_path / "run", 60)
    lines_of_a_resumed_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert training_seconds(run.steps) == pytest.approx(57 + 3 * 5)
    assert samples_by_source(run) == (60, {"a": 240})
    without_the_stop = [line for line in run.steps if line["step"] != 57]
    assert training_seconds(without_the_stop) == pytest.approx(50 + 3 * 5), "not 50 + 10 * 5"
    old = [{key: line[key] for key in line if key != "steps"} for line in run.steps]
    assert training_seconds(old) == pytest.approx(57 + 3 * 5), "steps since the line before"


def test_padding_and_what_was_left_out_are_stated(tmp_path: Path) -> None:
    write_recipe(tmp_path / "run", 60)
    why = "boxes beyond <300> of their image"
    lines_of_a_resumed_run(tmp_path / "run", padding=0.125, dropped={why: 1200, "others": "x"})
    source, _ = read_page(write_report(tmp_path / "run"))
    assert "padding in batches, median" in source and "12.5%" in source
    assert "left out: boxes beyond &lt;300&gt; of their image" in source and "8,400" in source
    lines_of_a_resumed_run(tmp_path / "run", dropped=7)
    source, _ = read_page(write_report(tmp_path / "run"))
    assert "padding in" not in source and "left out:" not in source


def test_samples_are_the_newest_that_the_run_counted(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_recipe(run_dir, 60)
    lines_of_a_resumed_run(run_dir)
    log_evaluation(run_dir, 50, 0.1, consumed=consumed(100))
    assert samples_by_source(read_run(run_dir)) == (50, {"lvis": 100, "imagenet_lvis": 50})
    _, text = read_page(write_report(run_dir))
    assert "samples by source, up to step 50" in text
    lines_of_a_resumed_run(run_dir, consumed={"samples": {"a": 239}, "instances": {}})
    log_evaluation(run_dir, 50, 0.1, consumed=consumed(100))
    assert samples_by_source(read_run(run_dir)) == (60, {"a": 239})


def test_each_kind_of_waiting_has_its_part_of_the_time(run_dir: Path) -> None:
    source, text = read_page(write_report(run_dir))
    assert "forward, backward, update, saving" in text and "saving checkpoints" not in text
    waits = {"checkpoint_wait": 0.3, "evaluation_wait": 0.2, "teacher_wait": 0.0}
    lines_of_a_resumed_run(run_dir, **waits, seconds=1.0)
    source, text = read_page(write_report(run_dir))
    for words in (
        "forward, backward, update: 40.0%",
        "waiting for data: 10.0%",
        "waiting for teacher: 0.0%",
        "saving checkpoints: 30.0%",
        "waiting for evaluation: 20.0%",
    ):
        assert f"<title>{words}</title>" in source
    lines_of_a_resumed_run(run_dir, **waits, seconds=0.5)
    source, _ = read_page(write_report(run_dir))
    assert "update: 0.0%" in source and "saving checkpoints: 50.0%" in source


def test_memory_says_whose_and_that_it_is_a_peak(run_dir: Path) -> None:
    _, text = read_page(write_report(run_dir))
    assert "first worker, peak resident memory so far" in text
    assert "first worker, peak allocated GPU memory so far" in text


def test_every_drawn_ap_was_logged(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_recipe(run_dir, 1000)
    for step in range(3, 903, 3):
        log_evaluation(run_dir, step, 0.9 if step == 450 else 0.1 + step / 10_000)
    one, other = write_report(run_dir), tmp_path / "c.html"
    write_comparison([run_dir, run_dir], other)
    curve = read_run(run_dir).curve
    known = {key: points(curve, key) for key in ("AP", "APr", "APc", "APf")}
    logged = {f"{x:.0f}|{format_number(y)}" for pairs in known.values() for x, y in pairs}
    for source in (read_page(one)[0], read_page(other)[0]):
        lines = re.findall(r'data-x="step" data-at="([^"]*)"', source)
        assert len(lines) in (4, 8) and "mean of step" not in source
        for line in lines:
            pairs = line.split(";")
            assert set(pairs) <= logged and len(pairs) > 100
            assert (pairs[0].split("|")[0], pairs[-1].split("|")[0]) == ("3", "900")
            assert any(pair.startswith("450|") for pair in pairs), "the highest is not lost"


def test_packages_that_matter_come_first(run_dir: Path) -> None:
    write_environment(run_dir)
    source, text = read_page(write_report(run_dir))
    assert "deformable attention Triton" in " ".join(text.split())
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
