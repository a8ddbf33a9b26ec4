"""Files that would be evaluated wrongly are refused, with the entry, the rule and the count."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated_scenes import Tree, disturb, draw_annotations

from pipeline.errors import DataError
from pipeline.evaluation.detections import load_detections, parse_detections
from pipeline.evaluation.ground_truth import load_annotations, parse_ground_truth

DETECTION = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}


def spoil(change: Callable[[Tree], Any]) -> Tree:
    tree = copy.deepcopy(draw_annotations(0))
    change(tree)
    return tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("categories"), "'categories' is missing"),
        (lambda t: t["annotations"].append(t["annotations"][0]), "annotations: .* more than once"),
        (lambda t: t["images"].append(t["images"][0]), "images: .* more than once"),
        (lambda t: t["categories"].append(t["categories"][0]), "categories: .* more than once"),
        (lambda t: t["annotations"][0].update(image_id=9), "9 is an unknown image id"),
        (lambda t: t["annotations"][0].update(category_id=99), "99 is an unknown category id"),
        (lambda t: t["annotations"][0].update(image_id="1"), "image_id must be whole numbers"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, -3, 4]), "negative size"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, 3]), "lists of 4 numbers"),
        (lambda t: t["annotations"][0].update(area=float("nan")), "area is not finite"),
        (lambda t: t["annotations"][0].update(iscrowd=1), "COCO file"),
        (lambda t: t["annotations"][0].pop("area"), "1 of .* entries have no 'area'"),
        (lambda t: t["images"][3].pop("neg_category_ids"), "1 images have no list neg_category"),
        (lambda t: t["images"][3].update(neg_category_ids=[99]), "99 is an unknown category in"),
        (lambda t: t["categories"][0].update(frequency="x"), "frequency 'x'"),
    ],
)
def test_bad_annotations(change: Callable[[Tree], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_ground_truth(spoil(change), "gt.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"score": 1.5},
            r"entry 0 \(image 1, 1.5\) has a score outside \[0, 1\] \(1 of 1\)",
        ),
        ({"score": float("nan")}, "score is not finite"),
        ({"bbox": [0, 0, 5, -1]}, "negative size"),
        ({"bbox": [0, 0, 5, float("inf")]}, "bbox is not finite"),
        ({"bbox": "0 0 5 5"}, "lists of 4 numbers"),
        ({"category_id": 1.0}, "category_id must be whole numbers"),
        ({"image_id": None}, "image_id must be whole numbers"),
    ],
)
def test_bad_detections(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_detections([DETECTION | change])


def test_missing_keys_are_counted() -> None:
    with pytest.raises(DataError, match="1 of 2 entries have no 'score'"):
        parse_detections([DETECTION, {k: v for k, v in DETECTION.items() if k != "score"}])


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(DataError, match="does not exist"):
        load_annotations(path)
    path.write_text(json.dumps(draw_annotations(0))[:-30])
    with pytest.raises(DataError, match="not complete json"):
        load_annotations(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="swapped"):
        load_detections(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="swapped"):
        load_annotations(path)


def test_detections_survive_a_file_to_the_last_bit(tmp_path: Path) -> None:
    detections = disturb(draw_annotations(1), 2, score_decimals=17)
    detections.save(tmp_path / "detections.json")
    again = load_detections(tmp_path / "detections.json")
    for name in ("image_id", "category_id", "bbox", "score"):
        np.testing.assert_array_equal(getattr(again, name), getattr(detections, name))
    assert [path.name for path in tmp_path.iterdir()] == ["detections.json"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    """Pieces end inside entries, strings and nested objects, and no entry is lost or torn."""
    rows = [
        DETECTION
        | {
            "image_id": i,
            "score": i / 500,
            "note": "}, {",
            "parts": [{"a": 1}, {"b": {}}] * (i % 4),
        }
        for i in range(400)
    ]
    path = tmp_path / "dt.json"
    path.write_text(json.dumps(rows, indent=indent))
    for size in (7, 100, 4096):
        monkeypatch.setattr("pipeline.evaluation.detections._PIECE_CHARACTERS", size)
        pieces = load_detections(path)
        whole = parse_detections(rows)
        for name in ("image_id", "category_id", "bbox", "score"):
            np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))
    for spoiled in (399, 3, 200):
        rows[spoiled]["score"] = 7.0
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"entry 3 \(image 3, 7.0\), entry 200 .* \(3 of 400\)"):
        load_detections(path)
    path.write_text(json.dumps(rows)[:-40])
    with pytest.raises(DataError, match=r"dt\.json is not complete json"):
        load_detections(path)
    path.write_text("[]")
    assert len(load_detections(path)) == 0


def test_the_digest_tells_ground_truths_apart() -> None:
    truth = parse_ground_truth(draw_annotations(4, num_images=9))
    assert truth.digest() == parse_ground_truth(draw_annotations(4, num_images=9)).digest()
    moved = spoil(lambda tree: tree["annotations"][0]["bbox"].__setitem__(0, 1.5))
    others = [truth.subset(truth.image_ids[:5]), truth.subset(truth.image_ids[1:6])]
    others += [parse_ground_truth(spoil(lambda tree: None)), parse_ground_truth(moved)]
    assert len({one.digest() for one in [truth, *others]}) == 5


def test_a_subset_keeps_the_federation_of_its_images() -> None:
    truth = parse_ground_truth(draw_annotations(4, num_images=9))
    ids = truth.image_ids[[1, 4, 8]]
    part = truth.subset(ids)
    columns = truth.num_categories

    def by_image(one: Any, pairs: Any) -> set[tuple[int, int]]:
        image, column = np.divmod(pairs, columns)
        return set(zip(one.image_ids[image].tolist(), column.tolist(), strict=True))

    for name in ("negative", "not_exhaustive"):
        expected = {
            pair for pair in by_image(truth, getattr(truth, name)) if pair[0] in set(ids.tolist())
        }
        assert by_image(part, getattr(part, name)) == expected
    assert len(part.image) == np.isin(truth.image_ids[truth.image], ids).sum()
    with pytest.raises(DataError, match="5 is not an image"):
        truth.subset(np.array([5]))
