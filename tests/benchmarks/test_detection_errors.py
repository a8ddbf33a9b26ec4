"""The kinds of false positives, on one image where each kind is there once."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import detection_errors

from pipeline.evaluation.detections import load_detections
from pipeline.evaluation.federated_ap import LVIS, kept
from pipeline.evaluation.ground_truth import parse_ground_truth
from pipeline.evaluation.matching import match


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A rare category 1 and a frequent category 2, with a box each, a common category 3 whose box
    nothing finds, and a second image where nothing is known of category 1."""
    images = [
        {"id": i, "width": 100, "height": 100, "neg_category_ids": [], "coco_url": "x/y.jpg"}
        | {"not_exhaustive_category_ids": []}
        for i in (7, 9)
    ]
    categories = [
        {"id": i, "name": name, "frequency": frequency, "image_count": 1, "instance_count": 1}
        | {"synset": f"{name}.n.01", "synonyms": [name], "def": name}
        for i, name, frequency in ((1, "can", "r"), (2, "cup", "f"), (3, "cap", "c"))
    ]
    boxes = [(7, 1, [10, 10, 20, 20]), (7, 2, [60, 60, 20, 20]), (9, 2, [10, 10, 20, 20])]
    boxes.append((9, 3, [60, 60, 20, 20]))
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": 400}
        | {"segmentation": [[0, 0, 1, 0, 1, 1]]}
        for n, (image, category, box) in enumerate(boxes, 1)
    ]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    found = [
        (7, 1, [90, 5, 8, 8], 0.9),  # on nothing
        (7, 1, [60, 60, 20, 20], 0.8),  # on the cup
        (7, 1, [10, 10, 40, 20], 0.7),  # exactly half: fits, and takes the can
        (7, 1, [10, 10, 20, 20], 0.6),  # the can again
        (7, 1, [22, 10, 20, 20], 0.5),  # a quarter of it
        (7, 2, [60, 60, 20, 20], 0.4),
        (9, 1, [10, 10, 20, 20], 0.3),  # does not count there
        (9, 2, [10, 10, 20, 20], 0.2),
    ]
    rows = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in found
    ]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    run = tmp_path / "run/evaluations/step_00000001"
    run.mkdir(parents=True)
    (run / "detections.json").write_text(json.dumps(rows))
    return tmp_path / "truth.json", tmp_path / "run"


def test_every_kind_is_told(files: tuple[Path, Path]) -> None:
    truth = parse_ground_truth(json.loads(files[0].read_text()))
    detections = load_detections(detection_errors.find_detections(files[1]))
    matches = match(truth, detections)
    boxes = detection_errors.boxes_of(matches, detections)
    kinds = detection_errors.kinds_of(truth, matches, boxes)
    told = {
        (int(image), float(score)): detection_errors.KINDS[kind] if kind >= 0 else "right"
        for image, score, kind in zip(matches.image_id, matches.score, kinds, strict=True)
    }
    assert told == {
        (7, 0.9): "background",
        (7, 0.8): "category",
        (7, 0.7): "right",
        (7, 0.6): "double",
        (7, 0.5): "loose",
        (7, 0.4): "right",
        (9, 0.2): "right",
    }
    assert kept(matches, LVIS).all()


def test_what_a_kind_costs(files: tuple[Path, Path]) -> None:
    """The can is third of its category: a precision of 1/3, and 1/2 without one of the two before
    it; what comes after it costs nothing."""
    truth = parse_ground_truth(json.loads(files[0].read_text()))
    rows = detection_errors.rows_of(
        truth, load_detections(detection_errors.find_detections(files[1]))
    )
    assert rows["r"] == pytest.approx([100 / 3, 0, 0, 100 / 6, 100 / 6, 0], abs=1e-6)
    assert rows["f"] == pytest.approx([100, 0, 0, 0, 0, 0], abs=1e-6)
    assert rows["c"] == pytest.approx([0, 0, 0, 0, 0, 100], abs=1e-6)


def test_an_evaluation_of_some_images_is_not_taken_for_one_of_all(files: tuple[Path, Path]) -> None:
    part = files[1] / "evaluations/step_00000002_subset"
    part.mkdir()
    (part / "detections.json").write_text("[]")
    assert detection_errors.find_detections(files[1]).parent.name == "step_00000001"


def test_a_run_without_an_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run longtail evaluate"):
        detection_errors.find_detections(tmp_path)
