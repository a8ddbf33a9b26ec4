"""What all protocols beside LVIS share: the files they take, the images, the form of results."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from exhaustive_scenes import draw_exhaustive, one_category
from federated_scenes import Tree, disturb, draw_annotations

from pipeline.errors import DataError
from pipeline.evaluation.average_precision import evaluate_coco, evaluate_voc, protocol_of
from pipeline.evaluation.detections import Detections, parse_detections
from pipeline.evaluation.results import evaluate_detections
from pipeline.evaluation.tables import format_table

Evaluate = Callable[..., dict[str, Any]]
NOTHING = parse_detections([])


def voc_2007(*args: Any, **keywords: Any) -> dict[str, Any]:
    return evaluate_voc(*args, year=2007, **keywords)


def voc_2010(*args: Any, **keywords: Any) -> dict[str, Any]:
    return evaluate_voc(*args, year=2010, **keywords)


@pytest.fixture(params=[evaluate_coco, voc_2007, voc_2010])
def evaluate(request: pytest.FixtureRequest) -> Evaluate:
    return request.param  # type: ignore[no-any-return]


def draw(seed: int, **keywords: Any) -> Tree:
    """Boxes of one kind only, so that every protocol takes them."""
    return draw_exhaustive(seed, flag="unknown_flag", **keywords)


def part(detections: Detections, rows: Any, images: Any = None) -> Detections:
    return Detections(
        detections.image_id[rows],
        detections.category_id[rows],
        detections.bbox[rows],
        detections.score[rows],
        images=images,
    )


def test_protocol_of_a_file() -> None:
    assert protocol_of(draw_annotations(0)) == "lvis"
    assert protocol_of(draw_exhaustive(0)) == "coco"
    mixed = draw_annotations(0)
    del mixed["images"][2]["neg_category_ids"]
    with pytest.raises(DataError, match=r"x\.json: 7 of 8 images have neg_category_ids"):
        protocol_of(mixed, "x.json")
    for tree in (
        {},
        {"images": [], "annotations": [], "categories": []},
        {"images": [3], "annotations": [], "categories": []},
        {"images": {}, "annotations": [], "categories": []},
        {"images": [{"id": 1}], "annotations": None, "categories": []},
    ):
        with pytest.raises(DataError, match="annotations: "):
            protocol_of(tree)


def test_a_federated_file_is_sent_to_the_lvis_protocol(evaluate: Evaluate) -> None:
    tree = draw_annotations(1)
    with pytest.raises(DataError, match="under the LVIS protocol") as raised:
        evaluate(tree, disturb(tree, 1), origin="lvis.json")
    assert "lvis.json" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["annotations"].append(t["annotations"][0]), "annotations: .* more than once"),
        (lambda t: t["images"].append(t["images"][0]), "images: .* more than once"),
        (lambda t: t["categories"].append(t["categories"][0]), "categories: .* more than once"),
        (lambda t: t["annotations"][0].update(image_id=9), "9 is an unknown image id"),
        (lambda t: t["annotations"][0].update(category_id=99), "99 is an unknown category id"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, -3, 4]), "negative size"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, 3]), "lists of 4 finite numbers"),
        (lambda t: t["annotations"][0].update(area=float("nan")), "area must be finite numbers"),
        (lambda t: t["annotations"][0].update(area=-1.0), "negative area"),
        (
            lambda t: t["annotations"][0].update(iscrowd="0"),
            "iscrowd must be one of the numbers 0, 1",
        ),
        (lambda t: t["annotations"].append(5), "json objects"),
        (lambda t: t.pop("categories"), "'categories' is missing"),
    ],
)
def test_bad_annotations(evaluate: Evaluate, change: Callable[[Tree], Any], message: str) -> None:
    tree = draw(2)
    change(tree)
    with pytest.raises(DataError, match=message) as raised:
        evaluate(tree, NOTHING, origin="gt.json")
    assert "gt.json" in str(raised.value)


@pytest.mark.parametrize(("key", "value"), [("image_id", 77), ("category_id", 99)])
def test_detections_of_something_unknown(evaluate: Evaluate, key: str, value: int) -> None:
    tree = draw(2)
    row = {"image_id": 100, "category_id": tree["categories"][0]["id"], "bbox": [0, 0, 5, 5]}
    with pytest.raises(DataError, match=f"{value} is an unknown"):
        evaluate(tree, parse_detections([row | {"score": 0.5, key: value}]), origin="x")


def test_what_it_is_given_stays_as_it_was(evaluate: Evaluate) -> None:
    tree = draw(3)
    detections = disturb(tree, 4)
    before, columns = copy.deepcopy(tree), copy.deepcopy(detections)
    first = evaluate(tree, detections, origin="x")
    assert tree == before
    for name in ("image_id", "category_id", "bbox", "score"):
        np.testing.assert_array_equal(getattr(detections, name), getattr(columns, name))
    first["protocols"]["mine"] = first["per_category"][0]["AP"] = "changed by the caller"
    again = evaluate(tree, detections, origin="x")
    assert again["protocols"] == {} and again["AP"] == first["AP"]
    assert again["per_category"][0]["AP"] != "changed by the caller"


def test_results_have_the_keys_of_the_lvis_results(evaluate: Evaluate) -> None:
    federated = draw_annotations(5)
    lvis = evaluate_detections(federated, disturb(federated, 6))
    tree = draw(5)
    results = evaluate(tree, disturb(tree, 6), origin="x")
    assert {key for key in lvis if "@" not in key} <= set(results)
    assert set(lvis["counts"]) <= set(results["counts"])
    assert list(lvis["per_category"][0]) == list(results["per_category"][0])
    assert results["counts"]["categories_with_ground_truth"].keys() == {"all", "r", "c", "f"}
    assert [results[key] for key in ("APr", "APc", "APf")] == [None] * 3
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert format_table(results).startswith(results["protocol"])


def test_no_detections_is_zero_where_ground_truth_is(evaluate: Evaluate) -> None:
    tree = draw(7)
    results = evaluate(tree, NOTHING, origin="x")
    assert results["AP"] == results["AP50"] == 0.0
    present = {row["category_id"] for row in tree["annotations"]}
    for row in results["per_category"]:
        assert row["AP"] == (0.0 if row["category_id"] in present else None)
        assert (row["instances"] > 0) == (row["images"] > 0) == (row["category_id"] in present)
    assert results["counts"]["categories_with_ground_truth"]["all"] == len(present)


def test_no_ground_truth_is_undefined(evaluate: Evaluate) -> None:
    tree = draw(7) | {"annotations": []}
    for detections in (disturb(draw(7), 8), NOTHING):
        results = evaluate(tree, detections, origin="x")
        fractions = {key: results[key] for key in results if key.startswith(("AP", "AR"))}
        assert set(fractions.values()) == {None}
        assert results["counts"]["detections"] == len(detections)
        assert results["counts"]["detections_counted"] == 0
    no_categories = tree | {"categories": []}
    assert evaluate(no_categories, NOTHING, origin="x")["per_category"] == []


def test_only_images_that_the_detector_saw_are_judged(evaluate: Evaluate) -> None:
    flag = "iscrowd" if evaluate is evaluate_coco else "difficult"
    tree = draw_exhaustive(9, num_images=10, flag=flag)
    everywhere = disturb(tree, 10)
    seen = [100, 103, 104, 107]
    cut = tree | {
        "images": [row for row in tree["images"] if row["id"] in seen],
        "annotations": [row for row in tree["annotations"] if row["image_id"] in seen],
    }
    some = part(everywhere, np.isin(everywhere.image_id, seen), np.array(seen))
    expected = evaluate(cut, part(some, slice(None)), origin="x")
    assert expected["AP"] is not None

    def same(results: dict[str, Any]) -> None:
        for key in set(expected) - {"protocol", "counts"}:
            assert results[key] == expected[key], key
        assert results["protocol"].endswith("4 of 10 images")
        assert (results["counts"]["images"], results["counts"]["images_annotated"]) == (4, 10)

    same(evaluate(tree, some, origin="x"))
    chosen = evaluate(tree, everywhere, origin="x", images=seen)
    same(chosen)
    elsewhere = int((~np.isin(everywhere.image_id, seen)).sum())
    assert elsewhere and chosen["counts"]["detections_elsewhere"] == elsewhere
    fewer = evaluate(tree, some, origin="x", images=seen[:2])
    assert fewer["counts"]["images"] == 2
    nothing = evaluate(tree, everywhere, origin="x", images=[])
    assert nothing["AP"] is None and nothing["counts"]["images"] == 0
    with pytest.raises(DataError, match="101 is an image to evaluate that was not detected on"):
        evaluate(tree, some, origin="x", images=[100, 101])
    with pytest.raises(DataError, match="5 is an unknown image id"):
        evaluate(tree, everywhere, origin="x", images=[5])
    with pytest.raises(DataError, match="is an image that has detections and is not among those"):
        evaluate(tree, part(everywhere, slice(None), np.array(seen)), origin="x")


def test_train_image_counts(evaluate: Evaluate) -> None:
    tree = draw(11)
    first, *others = (category["id"] for category in tree["categories"])
    counts = dict.fromkeys(others, 5)
    given = evaluate(tree, NOTHING, origin="x", train_image_counts=counts)["per_category"]
    assert [row["train_images"] for row in given] == [0] + [5] * len(others)
    stated = evaluate(tree, NOTHING, origin="x")["per_category"]
    assert [row["train_images"] for row in stated[:3]] == [1, 10, 100]
    del tree["categories"][0]["image_count"]
    rows = evaluate(tree, NOTHING, origin="x")["per_category"]
    assert rows[0]["category_id"] == first and rows[0]["train_images"] is None


def test_ground_truth_as_detections_is_perfect(evaluate: Evaluate) -> None:
    tree = one_category(
        {"image_id": 1, "bbox": [0, 0, 40, 40]},
        {"image_id": 1, "bbox": [100, 0, 40, 40]},
        {"image_id": 2, "bbox": [0, 0, 40, 40]},
    )
    rows = [{**row, "score": 1.0} for row in tree["annotations"]]
    results = evaluate(tree, parse_detections(rows), origin="x")
    assert results["AP"] == pytest.approx(1.0, abs=1e-12)
    (row,) = results["per_category"]
    assert (row["images"], row["instances"], row["detections"]) == (2, 3, 3)


def test_operating_point_and_curve_by_hand(evaluate: Evaluate) -> None:
    """F1 by threshold: 0.9 -> 2/3, 0.8 -> 1/2, 0.7 -> 4/5, 0.5 -> 2/3."""
    flag = "iscrowd" if evaluate is evaluate_coco else "difficult"
    tree = one_category(
        {"image_id": 1, "bbox": [0, 0, 3, 3], "category_id": 6, flag: 1},
        {"image_id": 1, "bbox": [0, 0, 100, 10]},
        {"image_id": 2, "bbox": [0, 0, 100, 10]},
        {"image_id": 2, "bbox": [200, 0, 100, 10], flag: 1},
    )
    tree["categories"] += [{"id": 6, "name": "ignored"}, {"id": 8, "name": "nowhere"}]
    rows = [
        (1, 7, 0, 0.9),  # true, IoU 1
        (1, 7, 300, 0.8),  # false
        (2, 7, 25, 0.7),  # true, IoU 75 / 125
        (2, 7, 200, 0.95),  # ignored
        (2, 8, 0, 0.99),  # of a category that has no AP
        (2, 7, 10, 0.5),  # false: a better one has taken the box
    ]
    keys = ("image_id", "category_id", "bbox", "score")
    detections = parse_detections(
        [
            dict(zip(keys, (image, category, [x, 0, 100, 10], score), strict=True))
            for image, category, x, score in rows
        ]
    )
    results = evaluate(tree, detections, origin="x")
    assert results["operating_point"] == {
        "score_threshold": 0.7,
        "iou_threshold": 0.5,
        "precision": 2 / 3,
        "recall": 1.0,
        "mean_iou": pytest.approx(0.8),
        "detections": 3,
        "true_positives": 2,
    }
    point = evaluate(tree, detections, origin="x", score_threshold=0.75)["operating_point"]
    assert (point["detections"], point["true_positives"], point["recall"]) == (2, 1, 0.5)
    curves = results["curves"]
    assert curves["recall"] == pytest.approx(np.linspace(0, 1, 101))
    assert curves["precision"]["all"]["0.50"] == pytest.approx([1.0] * 51 + [2 / 3] * 50)
    assert ("0.50:0.95" in format_table(results)) == (evaluate is evaluate_coco)
    for name in ("0.75", "0.50:0.95"):
        assert (curves["precision"]["all"][name] is None) == (evaluate is not evaluate_coco)


def test_nothing_judged_has_no_operating_point(evaluate: Evaluate) -> None:
    results = evaluate(draw(7), NOTHING, origin="x")
    assert results["operating_point"] is None
    assert results["curves"]["precision"]["all"]["0.50"] == [0.0] * 101
    nothing = evaluate(draw(7) | {"annotations": []}, disturb(draw(7), 8), origin="x")
    assert nothing["operating_point"] is None
    assert nothing["curves"]["precision"]["all"]["0.50"] is None
