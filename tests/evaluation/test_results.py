"""What an evaluation leaves on disk and says on the console."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from federated_scenes import Tree, disturb
from PIL import Image

from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import DataError
from pipeline.evaluation.detections import Detections, load_detections
from pipeline.evaluation.examples import choose_images, save_examples
from pipeline.evaluation.ground_truth import parse_ground_truth
from pipeline.evaluation.results import (
    AP_KEYS,
    evaluate_detections,
    write_results,
)
from pipeline.evaluation.tables import format_comparison, format_table


def test_results_on_disk(tmp_path: Path, tree: Tree, detections: Detections) -> None:
    results = evaluate_detections(tree, detections)
    folder = write_results(tmp_path, 40, results, detections)
    assert folder == tmp_path / "evaluations" / "step_00000040"
    stored = json.loads((folder / "results.json").read_text())
    assert stored == json.loads((tmp_path / "results.json").read_text())
    assert stored["step"] == 40 and "federated" in stored["protocol"]
    assert {key: stored[key] for key in AP_KEYS} == {key: results[key] for key in AP_KEYS}
    with (folder / "per_category.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["category_id"]) for row in rows] == sorted(c["id"] for c in tree["categories"])
    defined = [float(row["AP"]) for row in rows if row["AP"]]
    assert np.mean(defined) == pytest.approx(results["AP"], abs=1e-12)
    assert len(load_detections(folder / "detections.json")) == len(detections)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"results.json", "detections.json", "per_category.csv", "curves.json"}


def test_undefined_figures_are_null_and_a_dash(tmp_path: Path, tree: Tree) -> None:
    rare = {category["id"] for category in tree["categories"] if category["frequency"] == "r"}
    tree["annotations"] = [row for row in tree["annotations"] if row["category_id"] not in rare]
    detections = disturb(tree, 1)
    results = evaluate_detections(tree, detections)
    write_results(tmp_path, 1, results, detections)
    assert json.loads((tmp_path / "results.json").read_text())["APr"] is None
    protocol, names, figures, recall, counts, point = format_table(results).splitlines()
    assert "top 300" in protocol and point.startswith("at score ")
    assert dict(zip(names.split(), figures.split(), strict=True))["APr"] == "-"
    assert len(names) == len(figures)
    assert "0 rare" in counts
    assert recall.split()[::2] == ["AR@300", "ARs@300", "ARm@300", "ARl@300"]
    assert float(recall.split()[1]) == pytest.approx(results["AR@300"], abs=1e-4)


def test_a_comparison_tells_undefined_from_different() -> None:
    ours = {"AP": 0.5, "APr": None, "APc": None, "APf": 0.25}
    lines = format_comparison(ours, {"AP": 0.25, "APr": None, "APc": 0.5, "APf": None})
    differences = {line.split()[0]: line.split()[-1] for line in lines.splitlines()[1:]}
    assert differences == {"AP": "2.5e-01", "APr": "-", "APc": "differs", "APf": "differs"}


def test_train_image_counts_and_vocabulary(tree: Tree, detections: Detections) -> None:
    categories = [Category(id=c["id"], name=c["name"]) for c in tree["categories"]]
    vocabulary = Vocabulary(categories)
    counts = {category.id: 5 for category in categories[1:]}
    rows = evaluate_detections(tree, detections, vocabulary, counts)["per_category"]
    assert [row["train_images"] for row in rows] == [0] + [5] * (len(categories) - 1)
    stated = evaluate_detections(tree, detections)["per_category"]
    assert [row["train_images"] for row in stated[:3]] == [1, 10, 100]
    renamed = Vocabulary([Category(id=categories[0].id, name="kite"), *categories[1:]])
    with pytest.raises(DataError, match="is 'kite' to the detector and 'thing"):
        evaluate_detections(tree, detections, renamed)


def test_examples_show_rare_categories_first(
    tmp_path: Path, tree: Tree, detections: Detections
) -> None:
    truth = parse_ground_truth(tree)
    buffer = io.BytesIO()
    Image.new("RGB", (1280, 900), "teal").save(buffer, "JPEG")
    chosen = save_examples(tmp_path, truth, detections, lambda _: buffer.getvalue(), 4)
    assert chosen == choose_images(truth, 4) and len(chosen) == 4
    examples = json.loads((tmp_path / "examples.json").read_text())
    rare = [
        len({box["name"] for box in one["ground_truth"] if box["frequency"] == "r"})
        for one in examples
    ]
    assert rare == sorted(rare, reverse=True) and rare[0] > 0
    for one in examples:
        assert Image.open(tmp_path / one["file"]).size == (one["width"], one["height"])
        assert (one["width"], one["height"]) == (640, 450)
        scores = [box["score"] for box in one["detections"]]
        assert scores == sorted(scores, reverse=True)
        original = [row for row in tree["annotations"] if row["image_id"] == one["image_id"]]
        assert len(scores) <= max(3, len(original))
        drawn = sorted(box["bbox"] for box in one["ground_truth"])
        halved = sorted([round(v / 2, 1) for v in row["bbox"]] for row in original)
        assert np.allclose(drawn, halved, atol=0.11)


def test_examples_of_images_without_boxes(tmp_path: Path, tree: Tree) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    truth = parse_ground_truth(tree | {"annotations": []})
    nothing = disturb(tree | {"annotations": []}, 0)
    assert len(save_examples(tmp_path, truth, nothing, lambda _: buffer.getvalue(), 99)) == 10
