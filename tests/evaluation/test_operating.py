"""Operating points and curves against counts made by hand and a slow loop."""

from typing import Any

import numpy as np
import pytest
from federated_scenes import disturb, draw_annotations

from pipeline.evaluation.detections import parse_detections
from pipeline.evaluation.federated_ap import LVIS, kept
from pipeline.evaluation.ground_truth import parse_ground_truth
from pipeline.evaluation.matching import Matches, match
from pipeline.evaluation.operating import Judged, judge, operating_point
from pipeline.evaluation.results import evaluate_detections


def box(image: int, category: int, x: float, score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [x, 0, 100, 10], "score": score}


@pytest.fixture
def matches() -> Matches:
    """Two boxes of category 1 (one in each image), category 2 verified absent in image 1."""
    tree = {
        "images": [
            {"id": 1, "neg_category_ids": [2], "not_exhaustive_category_ids": []},
            {"id": 2, "neg_category_ids": [], "not_exhaustive_category_ids": [1]},
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 100, 10], "area": 1000}
            for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "one", "frequency": "r"}, {"id": 2, "name": "two"}],
    }
    detections = parse_detections(
        [
            box(1, 1, 0, 0.9),  # true, IoU 1
            box(1, 2, 0, 0.8),  # false: verified absent
            box(2, 1, 25, 0.7),  # true, IoU 75 / 125
            box(2, 1, 90, 0.6),  # ignored: not annotated exhaustively
            box(2, 2, 0, 0.95),  # not judged: nothing is known of it
            box(1, 1, 80, 0.5),  # false
        ]
    )
    return match(parse_ground_truth(tree), detections)


@pytest.mark.parametrize(
    ("threshold", "detections", "true", "recall", "iou"),
    [
        (0.95, 0, 0, 0.0, None),
        (0.9, 1, 1, 0.5, 1.0),
        (0.7, 3, 2, 1.0, 0.8),
        (0.55, 3, 2, 1.0, 0.8),
        (0.0, 4, 2, 1.0, 0.8),
    ],
)
def test_counts_at_a_threshold(
    matches: Matches, threshold: float, detections: int, true: int, recall: float, iou: float | None
) -> None:
    point = operating_point(judge(matches, kept(matches, LVIS)), threshold)
    assert point is not None
    assert (point.detections, point.true_positives) == (detections, true)
    assert point.precision == (true / detections if detections else None)
    assert point.recall == recall
    assert point.mean_iou == (None if iou is None else pytest.approx(iou))


def test_the_best_threshold_is_that_of_the_largest_f1(matches: Matches) -> None:
    """F1 by threshold: 0.9 -> 2/3, 0.8 -> 1/2, 0.7 -> 4/5, 0.5 -> 2/3."""
    point = operating_point(judge(matches, kept(matches, LVIS)))
    assert point is not None and point.score_threshold == 0.7


def test_of_equal_f1_the_highest_threshold_is_the_best() -> None:
    """Two boxes: one detection, true, has F1 2/3, and four, two of them true, have it too."""
    score, hit = np.array([0.3, 0.9, 0.5, 0.4]), np.array([True, True, False, False])
    point = operating_point(Judged(score, hit, hit.astype(float), num_truth=2))
    assert point is not None and point.score_threshold == 0.9
    assert point.precision is not None and point.recall is not None
    f1 = 2 * point.precision * point.recall / (point.precision + point.recall)
    assert f1 == pytest.approx(2 / 3)
    lowest = operating_point(Judged(score, hit, hit.astype(float), num_truth=2), 0.3)
    assert lowest is not None and (lowest.precision, lowest.recall) == (0.5, 1.0)


def test_best_threshold_of_random_scenes_by_trying_each() -> None:
    for seed in range(5):
        tree = draw_annotations(seed)
        found = match(parse_ground_truth(tree), disturb(tree, seed + 1, score_decimals=1))
        keep = kept(found, LVIS)
        best = operating_point(judge(found, keep))
        assert best is not None

        def f1(threshold: float, found: Matches = found, keep: Any = keep) -> float:
            point = operating_point(judge(found, keep), threshold)
            assert point is not None
            truth = int(found.truth_counts[:, 0].sum())
            return 2 * point.true_positives / (point.detections + truth)

        assert f1(best.score_threshold) == max(f1(t) for t in np.unique(found.score))


def test_nothing_to_judge_has_no_operating_point(matches: Matches) -> None:
    assert operating_point(judge(matches, np.zeros(len(matches.score), bool))) is None


def test_curves_average_to_the_ap_of_each_group() -> None:
    tree = draw_annotations(3, num_images=12)
    results = evaluate_detections(tree, disturb(tree, 4))
    curves = results["curves"]["precision"]
    assert list(curves) == ["all", "r", "c", "f"] and len(results["curves"]["recall"]) == 101
    for group, key in (("all", "AP"), ("r", "APr"), ("c", "APc"), ("f", "APf")):
        assert np.mean(curves[group]["0.50:0.95"]) == pytest.approx(results[key])
        assert (np.diff(curves[group]["0.50"]) <= 1e-12).all()
    assert np.mean(curves["all"]["0.50"]) == pytest.approx(results["AP50"])
    assert np.mean(curves["all"]["0.75"]) == pytest.approx(results["AP75"])
    tree["annotations"] = []
    empty = evaluate_detections(tree, disturb(draw_annotations(3), 4))["curves"]["precision"]
    assert empty["all"]["0.50"] is None
