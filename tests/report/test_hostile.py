"""Names that are markup, figures that are not numbers, and runs that are large."""

import csv
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_runs import log_evaluation, step_event, write_evaluation, write_metrics, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from page_reader import read_page

from pipeline.report.compare import render_comparison, write_comparison
from pipeline.report.compared import Compared
from pipeline.report.page import render, write_report
from pipeline.report.run_data import read_run

NAME = '</script><script>alert("1")</script>&amp;<img src=x onerror=alert(1)>'


def hostile_run(run_dir: Path) -> Path:
    write_recipe(run_dir, 30, description=NAME, initialize_from=NAME + run_dir.name)
    write_metrics(run_dir, 30, 30)
    write_evaluation(run_dir, 30, 0.7)
    folder = run_dir / "evaluations" / "step_00000030"
    path = folder / "per_category.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"name": NAME + row["category_id"]} for row in rows)
    examples = json.loads((folder / "examples.json").read_text())
    for example in examples:
        for box in [*example["ground_truth"], *example["detections"]]:
            box["name"] = NAME
    (folder / "examples.json").write_text(json.dumps(examples))
    results = json.loads((folder / "results.json").read_text())
    results |= {"protocol": NAME, "AR@<b>": 0.5, "subset": NAME}
    results["protocols"] = {NAME: {"protocol": NAME, "AP": 0.5}}
    (folder / "results.json").write_text(json.dumps(results))
    packages = {NAME: NAME, "torch": NAME}
    environment = {"python": NAME, "platform": NAME, "devices": [NAME], "packages": packages}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    consumed = {"samples": {NAME: 5}, "instances": {"r": 1}}
    log_evaluation(run_dir, 20, 0.5, subset=NAME, consumed=consumed)
    line = {"event": "step", "step": 31, "loss": 1.0, f"loss/{NAME}": 1.0, "samples": {NAME: 1}}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return run_dir


def test_names_that_are_markup_stay_words(tmp_path: Path) -> None:
    runs = [hostile_run(tmp_path / name) for name in ("one", "two")]
    for path in (write_report(runs[0]), write_comparison(runs, tmp_path / "comparison.html")):
        source, text = read_page(path)  # one script, nothing fetched, all tags nest
        assert "<img" not in source and "alert(1)>" in text


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.sampled_from([10**400, -(10**400)]),
    st.floats(),
    st.text("<&x7", max_size=4),
    st.lists(st.floats(), max_size=4),
    st.dictionaries(st.sampled_from(["r", "all", "0.50", "protocol", "AP"]), st.floats()),
)
known = [
    *("AP", "APr", "APc", "APf", "AP50", "AR@300", "protocol", "protocols", "counts", "subset"),
    *("operating_point", "consumed"),
]
step_keys = [
    "loss",
    "loss/class",
    "loss/class_0",
    "loss/",
    "loss/\n",
    "seconds",
    "steps",
    "samples",
]
step_keys += ["data_wait", "checkpoint_wait", "images_per_second", "grad_norm", "learning_rate"]
step_keys += ["stream", "memory_gb", "consumed", "step", "padding", "dropped"]


any_key = st.sampled_from(known)


def events(kind: str, keys: list[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    one = st.dictionaries(st.sampled_from(keys), values)
    return st.lists(one, max_size=4).map(
        lambda found: [{"event": kind, "step": n} | event for n, event in enumerate(found, start=1)]
    )


def like(sound: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Something sound, with one value that may not be, or that is not there."""
    return st.one_of(
        st.just(sound),
        st.tuples(st.sampled_from(sorted(sound)), values).map(lambda pair: sound | dict([pair])),
        st.sampled_from(sorted(sound)).map(lambda k: {n: v for n, v in sound.items() if n != k}),
    )


box = {"name": "cup", "frequency": "r", "bbox": [1.5, 2, 30, 40], "score": 0.5}
boxes = st.one_of(values, st.lists(like(box), max_size=4))
picture = {"image_id": 3, "file": "a.jpg", "width": 64, "height": 48}
examples = st.one_of(
    values,
    st.lists(
        st.builds(
            lambda entry, truth, found: entry | {"ground_truth": truth, "detections": found},
            like(picture),
            boxes,
            boxes,
        ),
        max_size=3,
    ),
)
category = {"category_id": 1, "name": "cup", "frequency": "r", "train_images": 3}
category |= {"instances": 4, "AP": 0.25}


def write_hostile(run_dir: Path, lines: list[dict[str, Any]], **files: Any) -> None:
    folder = run_dir / "evaluations" / "step_00000009"
    folder.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "a.jpg").write_bytes(b"picture")
    with (folder / "per_category.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(category))
        writer.writeheader()
        writer.writerows(files.pop("categories"))
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    (run_dir / "environment.json").write_text(json.dumps({"devices": files["results"]}))


@settings(max_examples=150, deadline=None)
@given(
    steps=events("step", step_keys),
    curve=events("evaluation", known),
    results=st.dictionaries(any_key, values),
    examples=examples,
    categories=st.lists(like(category), max_size=3),
)
def test_no_value_breaks_a_page(
    steps: list[dict[str, Any]],
    curve: list[dict[str, Any]],
    results: dict[str, Any],
    examples: Any,
    categories: list[dict[str, Any]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_hostile(
            Path(name),
            [*steps, *curve],
            results=results | {"step": 9},
            examples=examples,
            categories=categories,
            curves={"recall": [0, 1], "precision": results},
        )
        run = read_run(Path(name))
    assert [one.step for one in run.evaluations] == [9], "what is beside the figures is optional"
    for page in (render(run), render_comparison([Compared(n, "c1", run, []) for n in "ab"])):
        body = page[page.index("<main>") : page.index("<script>")]
        assert not re.search(r"\b(nan|inf)\b", re.sub(r"<p class=.note.*?</p>", "", body))


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"bbox": None},
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, 3, float("nan")]},
        {"frequency": "x"},
        {"frequency": ...},
        {"score": "0.5"},
    ],
)
def test_what_cannot_be_read_is_left_out_and_counted(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    bad = {key: value for key, value in (box | change).items() if value is not ...}
    entry = picture | {"ground_truth": [box], "detections": [bad, box, box]}
    damaged = [entry | {"height": 0}, entry | {"file": "absent.jpg"}, entry | {"image_id": 1.5}]
    write_hostile(
        tmp_path / "run",
        [{"event": "step", "step": 10**400, "loss": 1}, {"event": "step", "step": 3, "loss": 1}],
        results={"step": 9, "AP": 0.5},
        examples=[entry, *damaged],
        categories=[category, category | {"instances": ""}],
    )
    source, text = read_page(write_report(tmp_path / "run"))
    assert source.count('class="found rare"') == 2 and source.count("data:image/jpeg") == 1
    place = "evaluations/step_00000009/"
    assert f"{place}examples.json, boxes that could not be read: 1 left out." in text
    assert f"{place}examples.json, pictures that could not be read: 3 left out." in text
    assert f"{place}per_category.csv, rows that could not be read: 1 left out." in text
    assert "Lines of metrics.jsonl without a step that were left out: 1." in text


@pytest.mark.slow
def test_a_large_run_stays_small(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_recipe(run_dir, 20_000)
    rng = np.random.default_rng(0)
    layers = {
        f"loss/{base}{kind}_{layer}": 1.0
        for base in ("class", "box_l1", "box_giou")
        for kind in ("", "_dn")
        for layer in range(5)
    }
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(2, 20_001, 2):
            event = step_event(step, 20_000, rng, extra=step % 4 == 0) | layers
            file.write(json.dumps(event) + "\n")
    write_evaluation(run_dir, 20_000, 0.8, num_categories=1203)
    for picture in (run_dir / "evaluations" / "step_00020000").glob("example*"):
        picture.unlink()
    for step in range(100, 20_000, 100):
        log_evaluation(run_dir, step, 0.1, subset="500 of 19,809 images")
    page = write_report(run_dir)
    source, _ = read_page(page)
    assert source.count('<path class="mark') > 500
    assert page.stat().st_size < 3_000_000
    comparison = write_comparison([run_dir, run_dir, run_dir], tmp_path / "comparison.html")
    read_page(comparison)
    assert comparison.stat().st_size < 3_000_000


@pytest.mark.parametrize("text", ["[]", "3", "null", "{"])
def test_results_that_are_no_results(tmp_path: Path, text: str) -> None:
    run_dir = tmp_path / "run"
    write_evaluation(run_dir, 5, 0.9)
    (run_dir / "evaluations" / "step_00000005" / "results.json").write_text(text)
    write_recipe(run_dir, 5)
    _, shown = read_page(write_report(run_dir))
    assert "evaluations/step_00000005 could not be read" in shown
