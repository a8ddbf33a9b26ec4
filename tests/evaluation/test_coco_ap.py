"""COCO AP against figures published with the COCO API, another implementation, and itself."""

import contextlib
import copy
import io
import sys
from pathlib import Path
from typing import Any

import faster_coco_eval
import numpy as np
import pytest
from exhaustive_scenes import draw_exhaustive, one_category
from federated_scenes import Tree, disturb
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.errors import DataError
from pipeline.evaluation import coco_ap
from pipeline.evaluation.average_precision import evaluate_coco
from pipeline.evaluation.detections import Detections, load_detections, parse_detections
from pipeline.evaluation.ground_truth import load_annotations

KEYS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl",
    "AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100",
)  # fmt: skip


def found(*rows: tuple[int, list[float], float]) -> Detections:
    """(image, box, score) of the category 7."""
    return parse_detections(
        [
            {"image_id": image, "category_id": 7, "bbox": box, "score": score}
            for image, box, score in rows
        ]
    )


def faster(tree: Tree, detections: Detections) -> Any:
    truth = faster_coco_eval.COCO(copy.deepcopy(tree))
    evaluation = faster_coco_eval.COCOeval_faster(
        truth, truth.loadRes(list(detections.to_rows())), "bbox"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def stock(tree: Tree, detections: Detections) -> Any:
    """All images and categories at once, as the COCO API's demo does."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(tree)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(list(detections.to_rows())), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_same_point(tree: Tree, detections: Detections, evaluation: Any) -> None:
    """Counts at one score and curves against the stock evaluation's matches and its table."""
    with_truth = {row["category_id"] for row in tree["annotations"] if not row.get("iscrowd")}
    true = judged = 0
    for one in evaluation.evalImgs:
        if one and one["category_id"] in with_truth and one["aRng"] == [0, 1e10]:
            kept = (np.array(one["dtScores"]) >= 0.3) & ~one["dtIgnore"][0].astype(bool)
            judged += int(kept.sum())
            true += int((kept & (one["dtMatches"][0] > 0)).sum())
    results = evaluate_coco(tree, detections, origin="x", score_threshold=0.3)
    point = results["operating_point"]
    assert (point["detections"], point["true_positives"]) == (judged, true)
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    precision = precision[..., (precision > -1).all((0, 1))]
    curves = results["curves"]["precision"]["all"]
    for name, rows in (("0.50", [0]), ("0.75", [5]), ("0.50:0.95", list(range(10)))):
        if precision.size:
            np.testing.assert_allclose(curves[name], precision[rows].mean((0, 2)), atol=1e-12)
        else:
            assert curves[name] is None


def assert_equal(tree: Tree, detections: Detections, evaluation: Any) -> dict[str, Any]:
    """Every figure of the summary, and AP and AR of every category."""
    ours = evaluate_coco(tree, detections, origin="x")
    for key, value in zip(KEYS, evaluation.stats, strict=False):
        expected = None if value == -1 else pytest.approx(value, abs=1e-12, rel=0)
        assert ours[key] == expected, key
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    recall = np.asarray(evaluation.eval["recall"])[:, :, 0, -1]
    for column, row in enumerate(ours["per_category"]):
        for key, values in (
            ("AP", precision[:, :, column]),
            ("AP50", precision[0, :, column]),
            ("AP75", precision[5, :, column]),
            ("AR", recall[:, column]),
        ):
            undefined = (values == -1).all()
            expected = None if undefined else pytest.approx(values.mean(), abs=1e-12, rel=0)
            assert row[key] == expected, (row["category_id"], key)
    return ours


def test_the_published_figures_of_the_coco_demo(shared_data: Path) -> None:
    folder = shared_data / "results"
    tree = load_annotations(folder / "instances_val2014_100.json")
    detections = load_detections(folder / "instances_val2014_fakebbox100_results.json")
    results = assert_equal(dict(tree), detections, stock(dict(tree), detections))
    assert [round(results[key], 3) for key in KEYS] == [
        0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564,
    ]  # fmt: skip
    assert_same_point(dict(tree), detections, stock(dict(tree), detections))
    assert results["protocol"] == (
        "COCO box AP, IoU 0.50:0.95, top 100 detections per image and category, 100 images"
    )
    assert results["counts"]["crowd_regions"] == 9
    assert results["counts"]["instances"] == 830


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 10),
    categories=st.integers(3, 6),
    copies=st.integers(1, 4),
    decimals=st.integers(0, 3),
    grid=st.sampled_from([0, 20]),
)
def test_random_scenes_with_ties_and_crowds(
    seed: int, images: int, categories: int, copies: int, decimals: int, grid: int
) -> None:
    tree = draw_exhaustive(seed, images, categories, grid)
    detections = disturb(tree, seed + 1, copies, decimals, grid)
    if len(detections):
        assert_equal(tree, detections, faster(tree, detections))
        evaluation = stock(tree, detections)
        assert_equal(tree, detections, evaluation)
        assert_same_point(tree, detections, evaluation)


def test_a_hundred_of_each_image_and_category_count() -> None:
    tree = draw_exhaustive(3, num_images=2, num_categories=3)
    detections = disturb(tree, 4, copies=60, score_decimals=1)
    results = assert_equal(tree, detections, faster(tree, detections))
    pairs = np.unique(
        np.stack([detections.image_id, detections.category_id]), axis=1, return_counts=True
    )[1]
    over = int(np.maximum(pairs - 100, 0).sum())
    assert over > 0 and results["counts"]["detections_over_limit"] == over
    within = sum(row["detections"] for row in results["per_category"])
    assert within == len(detections) - over
    # The limit is per category: the 101st of an image counts where it is of another category.
    hundred = found(*[(1, [500.0, 0, 9, 9], 0.9)] * 100, (1, [0.0, 0, 50, 50], 0.8))
    tree = one_category({"image_id": 1, "bbox": [0, 0, 50, 50]})
    assert evaluate_coco(tree, hundred, origin="x")["AP"] == 0.0
    other = hundred.category_id.copy()
    other[:100] = 8
    tree["categories"].append({"id": 8, "name": "other"})
    spread = Detections(hundred.image_id, other, hundred.bbox, hundred.score)
    assert evaluate_coco(tree, spread, origin="x")["AP"] == pytest.approx(1.0)


def test_crowd_regions_excuse_any_number_of_detections() -> None:
    tree = one_category(
        {"image_id": 1, "bbox": [0, 0, 50, 50]},
        {"image_id": 1, "bbox": [100, 0, 200, 200], "iscrowd": 1},
    )
    inside = [(1, [110.0 + 20 * i, 10, 15, 15], 0.9) for i in range(4)]
    detections = found(*inside, (1, [0, 0, 50, 50], 0.5))
    results = evaluate_coco(tree, detections, origin="x")
    assert results["AP"] == pytest.approx(1.0, abs=1e-12)
    assert results["counts"]["instances"] == results["per_category"][0]["instances"] == 1
    tree["annotations"][1]["iscrowd"] = 0
    assert evaluate_coco(tree, detections, origin="x")["AP"] < 0.2


@pytest.mark.parametrize("key", ["isgroupof", "IsGroupOf"])
def test_groups_of_openimages_are_crowd_regions(key: str) -> None:
    tree = one_category(
        {"image_id": 1, "bbox": [0, 0, 50, 50], key: 0},
        {"image_id": 1, "bbox": [100, 0, 200, 200], key: 1},
        {"image_id": 2, "bbox": [0, 0, 50, 50], key: -1},
    )
    rows = [(1, [110.0 + 20 * i, 10, 15, 15], 0.9) for i in range(4)]
    detections = found(*rows, (1, [0, 0, 50, 50], 0.5), (2, [0, 0, 50, 50], 0.5))
    results = evaluate_coco(tree, detections, origin="x", name="OpenImages")
    assert results["AP"] == pytest.approx(1.0, abs=1e-12)
    assert results["protocol"] == (
        "OpenImages box AP, COCO-style (every category judged in every image, no label hierarchy), "
        "IoU 0.50:0.95, top 100 detections per image and category, 2 images, group boxes taken "
        "as crowd regions: 1, areas taken as width x height: 3"
    )
    assert results["counts"]["group_boxes"] == results["counts"]["crowd_regions"] == 1
    second = evaluate_coco(tree, detections, origin="x", images=[2])
    special = ("group_boxes", "crowd_regions", "areas_from_boxes", "detections_elsewhere")
    assert [second["counts"][key] for key in special] == [0, 0, 1, 5]
    tree["annotations"][0][key] = 2
    with pytest.raises(DataError, match=f"{key} must be one of the numbers -1, 0, 1"):
        evaluate_coco(tree, detections, origin="x")


@pytest.mark.parametrize("name", ["Visual Genome", "Objects365"])
def test_other_data_sets_are_evaluated_like_coco(name: str) -> None:
    tree = draw_exhaustive(5)
    detections = disturb(tree, 6)
    coco = evaluate_coco(tree, detections, origin="x")
    other = evaluate_coco(tree, detections, origin="x", name=name)
    assert other["protocol"].startswith(f"{name} box AP, COCO-style")
    assert coco["protocol"].startswith("COCO box AP, IoU")
    assert {k: v for k, v in other.items() if k != "protocol"} == {
        k: v for k, v in coco.items() if k != "protocol"
    }


def test_annotation_id_zero_is_an_id_like_any_other() -> None:
    tree = draw_exhaustive(7)
    detections = disturb(tree, 8)
    expected = evaluate_coco(tree, detections, origin="x")
    for position, row in enumerate(tree["annotations"]):
        row["id"] = position
    assert evaluate_coco(tree, detections, origin="x") == expected
    # The package itself loses the match, which is why the ids are numbered anew.
    zero = one_category({"image_id": 1, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0})
    zero["annotations"][0]["id"] = 0
    perfect = found((1, [0, 0, 50, 50], 0.9))
    assert stock(zero, perfect).stats[0] == 0.0
    assert evaluate_coco(zero, perfect, origin="x")["AP"] == pytest.approx(1.0, abs=1e-12)


def test_missing_area_and_iscrowd() -> None:
    tree = draw_exhaustive(9)
    for row in tree["annotations"]:
        row.update(area=row["bbox"][2] * row["bbox"][3], iscrowd=0)
    detections = disturb(tree, 10)
    expected = evaluate_coco(tree, detections, origin="x")
    assert expected["counts"]["areas_from_boxes"] == 0
    assert "area" not in expected["protocol"]
    for row in tree["annotations"][::2]:
        del row["area"], row["iscrowd"]
    results = evaluate_coco(tree, detections, origin="x")
    missing = len(tree["annotations"][::2])
    assert results["counts"]["areas_from_boxes"] == missing
    assert results["protocol"].endswith(f", areas taken as width x height: {missing}")
    assert {key: results[key] for key in KEYS} == {key: expected[key] for key in KEYS}


def test_ignore_without_iscrowd_has_no_effect() -> None:
    tree = draw_exhaustive(11)
    detections = disturb(tree, 12)
    expected = evaluate_coco(tree, detections, origin="x")
    for row in tree["annotations"]:
        row["ignore"] = 1
    assert evaluate_coco(tree, detections, origin="x") == expected
    assert_equal(tree, detections, stock(tree, detections))


def test_it_is_silent_and_leaves_the_output_as_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = draw_exhaustive(13)
    detections = disturb(tree, 14)
    before = sys.stdout
    evaluate_coco(tree, detections, origin="x")
    assert sys.stdout is before

    class Broken(COCOeval):  # type: ignore[misc]
        def accumulate(self, p: Any = None) -> None:
            raise MemoryError

    monkeypatch.setattr(coco_ap, "COCOeval", Broken)
    with pytest.raises(MemoryError):
        evaluate_coco(tree, detections, origin="x")
    assert sys.stdout is before
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""
