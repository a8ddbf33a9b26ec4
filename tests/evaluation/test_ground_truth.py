"""Files that would be evaluated wrongly are refused, with the entry, the rule and the count."""

import copy
import gzip
import json
import pickle
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
        (lambda t: t["annotations"][0].update(bbox=[1, 2, 3]), "lists of 4 finite numbers"),
        (lambda t: t["annotations"][0].update(area=float("nan")), "area must be finite numbers"),
        (lambda t: t["annotations"][0].update(iscrowd=1), "COCO file"),
        (lambda t: t["annotations"][0].pop("area"), "entries have no 'area'.* \\(1 of"),
        (lambda t: t["images"][3].pop("neg_category_ids"), "1 images have no list neg_category"),
        (lambda t: t["images"][3].update(neg_category_ids=[99]), "99 is an unknown category in"),
        (lambda t: t["categories"][0].update(frequency="x"), "frequency 'x'"),
        (lambda t: t["categories"][0].pop("id"), "categories: entries have no 'id'"),
        (lambda t: t["categories"][0].update(id="a"), "categories: id must be whole numbers"),
        (lambda t: t["categories"].append(None), "categories: entries must be json objects"),
        (lambda t: t["annotations"].append([1]), r"json objects with 'id'; entry \d+ \(\[1\]\)"),
        (lambda t: t["categories"][0].update(image_count="many"), "image_count must be whole"),
        (lambda t: t["annotations"][0].update(id=2**63), f"below 2.63; .*{2**63}"),
        (lambda t: t["annotations"][0].update(area=-5), "has a negative area"),
        (lambda t: t["annotations"][0].update(area="5"), r"area must be finite numbers; .*'5'\)"),
        (
            lambda t: t["annotations"][0].update(ignore="0"),
            "ignore must be one of the numbers 0, 1",
        ),
        (lambda t: t["annotations"][0].update(iscrowd="0"), "iscrowd must be one of the numbers"),
        (lambda t: t["images"][3].update(neg_category_ids=[2.5]), r"lists of whole .*\[2.5\]"),
        (lambda t: t["images"][3].update(neg_category_ids=["x"]), r"lists of whole .*\['x'\]"),
        (lambda t: t["images"][3].update(neg_category_ids=[[1]]), "lists of whole numbers"),
        (lambda t: t["images"][3].update(not_exhaustive_category_ids=[True]), "lists of whole"),
        (lambda t: t["images"][3].update(neg_category_ids=[2**70]), "lists of whole numbers"),
    ],
)
def test_bad_annotations(change: Callable[[Tree], Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        parse_ground_truth(spoil(change), "gt.json")
    assert str(raised.value).startswith("gt.json: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"score": 1.5},
            r"entry 0 \(image 1, 1.5\) has a score outside \[0, 1\] \(1 of 1\)",
        ),
        ({"score": float("nan")}, r"score must be finite.* entry 0 \(image 1, nan\) \(1 of 1\)"),
        ({"score": 10**400}, "score must be finite numbers"),
        ({"score": "0.5"}, r"score must be finite numbers; entry 0 \(image 1, '0.5'\)"),
        ({"score": True}, "score must be finite numbers"),
        ({"score": None}, "score must be finite numbers"),
        ({"bbox": ["1", "2", "3", "4"]}, "lists of 4 finite numbers"),
        ({"bbox": [1, 2, 3, True]}, "lists of 4 finite numbers"),
        ({"bbox": [1, 2, 3, [4]]}, "lists of 4 finite numbers"),
        ({"bbox": [0, 0, 5, -1]}, "negative size"),
        ({"bbox": [0, 0, 5, float("inf")]}, "lists of 4 finite numbers"),
        ({"bbox": "0 0 5 5"}, "lists of 4 finite numbers"),
        ({"category_id": 1.0}, "category_id must be whole numbers"),
        ({"image_id": None}, "image_id must be whole numbers"),
        ({"image_id": True}, "image_id must be whole numbers"),
        ({"image_id": 2**63}, f"whole numbers below 2.63; entry 0 .{2**63}. "),
        ({"image_id": 2**70}, f"whole numbers below 2.63; entry 0 .{2**70}. "),
    ],
)
def test_bad_detections(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        parse_detections([DETECTION | change], "dt.json")
    assert str(raised.value).startswith("dt.json: ")
    good = {"image_id": 2, "score": 0.25}
    with pytest.raises(DataError, match=r"entry 1 .*\(1 of 3\)"):
        parse_detections([DETECTION | good, DETECTION | change, DETECTION])


def test_an_error_passes_from_process_to_process() -> None:
    with pytest.raises(DataError) as raised:
        parse_detections([DETECTION | {"score": "0.5"}])
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value) and isinstance(again, DataError)


def test_missing_keys_are_counted() -> None:
    with pytest.raises(
        DataError, match=r"entries have no 'score'.* entry 1 \(image 1\) \(1 of 2\)"
    ):
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
    for text, message in (
        ("[" * 100_000, "nested too deep"),
        ("[1" + "0" * 5000, "not complete json"),
        ("", "not complete json"),
    ):
        path.write_text(text)
        for load in (load_annotations, load_detections):
            with pytest.raises(DataError, match=rf"file\.json is .*{message}"):
                load(path)
    path.write_bytes(gzip.compress(b"[]"))
    for load in (load_annotations, load_detections):
        with pytest.raises(DataError, match=r"file\.json is .* is it compressed"):
            load(path)
    path.write_bytes(b"\xef\xbb\xbf[]")
    assert len(load_detections(path)) == 0


def test_whole_and_other_numbers_of_numpy_are_numbers() -> None:
    row = {"image_id": np.int64(3), "category_id": 2, "score": np.float32(0.5)}
    found = parse_detections([row | {"bbox": (np.float64(1), 2, 3, np.int32(4))}])
    assert (found.image_id.tolist(), found.bbox.tolist()) == ([3], [[1.0, 2.0, 3.0, 4.0]])


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
    text = json.dumps(rows)
    path.write_text(text[:-40])
    with pytest.raises(json.JSONDecodeError) as whole_file:
        json.loads(text[:-40])
    where = f"at character {whole_file.value.pos}"
    with pytest.raises(DataError, match=rf"dt\.json is not complete json .*{where}"):
        load_detections(path)
    # What breaks an earlier rule is told first, wherever it stands, with all of its kind.
    for spoiled, bad in ((2, {"score": None}), (150, {"category_id": 0.5}), (390, {"bbox": []})):
        rows[spoiled].update(bad)
    del rows[300]["category_id"], rows[395]["category_id"]
    path.write_text(json.dumps(rows))
    rule = r"entries have no 'category_id'.* entry 300 \(image 300\), entry 395 .* \(2 of 400\)"
    for size in (7, 100, 4096, 1 << 24):
        monkeypatch.setattr("pipeline.evaluation.detections._PIECE_CHARACTERS", size)
        with pytest.raises(DataError, match=rule):
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
