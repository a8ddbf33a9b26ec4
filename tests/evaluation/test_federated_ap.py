"""Our evaluator against the official package, figure by figure."""

import json
from pathlib import Path

import numpy as np
import pytest
from federated_scenes import Tree, disturb, draw_annotations
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.evaluation.detections import (
    Detections,
    concatenate,
    load_detections,
    parse_detections,
)
from pipeline.evaluation.federated_ap import (
    FIXED,
    LVIS,
    FederatedAP,
    Protocol,
    accumulate,
    kept,
    over_limit,
    top_of_image,
)
from pipeline.evaluation.ground_truth import parse_ground_truth
from pipeline.evaluation.matching import Matches, match, merge
from pipeline.evaluation.official import official_lvis
from pipeline.evaluation.results import evaluate_detections

KEYS = [
    "AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf",
    "AR@300", "ARs@300", "ARm@300", "ARl@300",
]  # fmt: skip
NOTHING = parse_detections([])


def assert_equal_to_official(tree: Tree, detections: Detections) -> dict[str, float | None]:
    ours, official = evaluate_detections(tree, detections), official_lvis(tree, detections)
    assert list(official) == KEYS
    for key in KEYS:
        if official[key] is None:
            assert ours[key] is None, key
        else:
            assert ours[key] == pytest.approx(official[key], abs=1e-12, rel=0), key
    return {key: ours[key] for key in KEYS}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 12),
    categories=st.integers(3, 12),
    copies=st.integers(0, 4),
    decimals=st.integers(0, 3),
    grid=st.sampled_from([0, 20]),
)
def test_random_scenes_with_ties(
    seed: int, images: int, categories: int, copies: int, decimals: int, grid: int
) -> None:
    tree = draw_annotations(seed, images, categories, grid=grid)
    assert_equal_to_official(tree, disturb(tree, seed + 1, copies, decimals, grid))


@pytest.mark.parametrize("name", ["lvis_val_9", "lvis_val_100"])
def test_real_annotations(shared_data: Path, name: str) -> None:
    tree = json.loads((shared_data / "derived" / f"{name}_as_v1_categories.json").read_text())
    figures = assert_equal_to_official(tree, disturb(tree, 3, copies=4, score_decimals=1))
    assert figures["AP"] is not None and 0.1 < figures["AP"] < 0.9
    assert figures["APr"] is None  # these files have no rare category


def test_ground_truth_as_detections_is_perfect(shared_data: Path) -> None:
    tree = json.loads((shared_data / "derived" / "lvis_val_9_as_v1_categories.json").read_text())
    rows = [{**row, "score": 1.0} for row in tree["annotations"]]
    figures = assert_equal_to_official(tree, parse_detections(rows))
    for key in ("AP", "AP75", "APc", "APf", "AR@300"):
        assert figures[key] == pytest.approx(1.0, abs=1e-12)


def test_a_real_detectors_output(shared_data: Path) -> None:
    """The detections of the COCO demo, on its annotations in LVIS form: crowds left out, some of
    the categories that an image does not show verified absent, some not annotated exhaustively."""
    folder = shared_data / "results"
    tree = json.loads((folder / "instances_val2014_100.json").read_text())
    detections = load_detections(folder / "instances_val2014_fakebbox100_results.json")
    tree["annotations"] = [row for row in tree["annotations"] if not row["iscrowd"]]
    rng = np.random.default_rng(0)
    category_ids = [category["id"] for category in tree["categories"]]
    present: dict[int, set[int]] = {image["id"]: set() for image in tree["images"]}
    for row in tree["annotations"]:
        present[row["image_id"]].add(row["category_id"])
    for image in tree["images"]:
        shown = sorted(present[image["id"]])
        absent = sorted(set(category_ids) - set(shown))
        image["neg_category_ids"] = rng.choice(absent, 40, replace=False).tolist()
        image["not_exhaustive_category_ids"] = [one for one in shown if rng.random() < 0.1]
    images_of = [sum(one in shown for shown in present.values()) for one in category_ids]
    for category, number in zip(tree["categories"], images_of, strict=True):
        category["frequency"] = "r" if number <= 2 else "c" if number <= 6 else "f"
    figures = assert_equal_to_official(tree, detections)
    assert all(value is not None and 0.2 < value < 0.8 for value in figures.values()), figures
    # Federation matters on them: were all categories verified, AP would be another.
    for image in tree["images"]:
        image["neg_category_ids"] = sorted(set(category_ids) - present[image["id"]])
    assert assert_equal_to_official(tree, detections)["AP"] != figures["AP"]


def test_crowds_are_refused_though_the_official_package_takes_them_for_objects() -> None:
    tree = one_image([], [])
    detections = found((1, 1, 0, 0.9))
    figures = assert_equal_to_official(tree, detections)
    tree["annotations"][0]["iscrowd"] = 1
    assert official_lvis(tree, detections) == pytest.approx(figures)
    with pytest.raises(DataError, match="1 is a crowd: LVIS has none, so this is a COCO file"):
        evaluate_detections(tree, detections)


def test_no_detections_is_zero_where_ground_truth_is() -> None:
    tree = draw_annotations(0)
    figures = assert_equal_to_official(tree, NOTHING)
    assert figures["AP"] == 0.0 and figures["AR@300"] == 0.0


def test_no_ground_truth_is_undefined() -> None:
    tree = draw_annotations(1) | {"annotations": []}
    detections = disturb(draw_annotations(1), 2)
    assert set(assert_equal_to_official(tree, detections).values()) == {None}


def test_a_category_without_ground_truth_takes_no_part() -> None:
    tree = draw_annotations(2)
    gone = tree["annotations"][0]["category_id"]
    detections = disturb(tree, 3)
    tree["annotations"] = [row for row in tree["annotations"] if row["category_id"] != gone]
    assert_equal_to_official(tree, detections)
    per_category = evaluate_detections(tree, detections)["per_category"]
    rows = {row["category_id"]: row for row in per_category}
    assert rows[gone]["AP"] is None and rows[gone]["instances"] == 0


@pytest.mark.parametrize("decimals", [1, 6])
def test_only_the_best_300_of_an_image_count(decimals: int) -> None:
    tree = draw_annotations(5, num_images=2, boxes_per_image=12)
    detections = disturb(tree, 6, copies=60, score_decimals=decimals)
    results = evaluate_detections(tree, detections)
    assert results["counts"]["detections_over_limit"] > 100
    assert_equal_to_official(tree, detections)
    for limit in (17, 10_000):
        ours = evaluate_detections(tree, detections, protocol=top_of_image(limit))
        for key, value in official_lvis(tree, detections, limit).items():
            assert ours[key] == pytest.approx(value, abs=1e-12), (limit, key)


@pytest.mark.parametrize("limit", [5, 40, 10_000])
def test_fixed_ap_is_the_official_figure_of_each_categorys_best(limit: int) -> None:
    """Cutting the list by category beforehand and by image never is the definition itself."""
    tree = draw_annotations(9, num_images=10)
    detections = disturb(tree, 10, copies=12, score_decimals=9)
    best = []
    for category_id in np.unique(detections.category_id):
        rows = np.flatnonzero(detections.category_id == category_id)
        best.append(rows[np.argsort(-detections.score[rows], kind="stable")[:limit]])
    rows = np.sort(np.concatenate(best))
    cut = Detections(
        detections.image_id[rows],
        detections.category_id[rows],
        detections.bbox[rows],
        detections.score[rows],
    )
    protocol = Protocol("fixed", per_category=limit)
    ours = evaluate_detections(tree, detections, protocol=protocol)
    assert ours["counts"]["detections_over_limit"] == len(detections) - len(rows)
    for key, value in official_lvis(tree, cut, -1).items():
        expected = None if value is None else pytest.approx(value, abs=1e-12)
        assert ours[key.replace("@-1", "@fixed")] == expected, key


def test_of_equal_scores_a_category_keeps_the_smaller_image_then_the_first() -> None:
    """Image 1 has a true detection and then a false one, image 2 a false one, all of one score."""
    tree = one_image([], [])
    tree["annotations"][1]["category_id"] = 1
    detections = found((2, 1, 200, 0.5), (1, 1, 0, 0.5), (1, 1, 200, 0.5))
    matches = match(parse_ground_truth(tree), detections)
    for limit, expected in ((1, [(1, 0)]), (2, [(1, 0), (1, 1)]), (3, [(1, 0), (1, 1), (2, 0)])):
        rows = kept(matches, Protocol("few", per_category=limit))
        pairs = zip(matches.image_id[rows].tolist(), matches.rank[rows].tolist(), strict=True)
        assert sorted(pairs) == expected
    results = evaluate_detections(tree, detections, protocol=Protocol("one", per_category=1))
    assert results["AP50"] == pytest.approx(51 / 101)  # one of two boxes, without a false one


def test_every_protocol_comes_from_one_pass_and_is_labelled() -> None:
    tree = draw_annotations(5, num_images=3, boxes_per_image=12)
    detections = disturb(tree, 6, copies=80, score_decimals=6)
    results = evaluate_detections(tree, detections)
    labelled = results["protocols"]
    assert list(labelled) == ["300", "1000", "fixed"]
    for number in ("300", "1000"):
        for key, value in official_lvis(tree, detections, int(number)).items():
            assert labelled[number][key] == pytest.approx(value, abs=1e-12), (number, key)
    assert {key: results[key] for key in KEYS} == {key: labelled["300"][key] for key in KEYS}
    assert results["AP"] != labelled["1000"]["AP"] != labelled["fixed"]["AP"]
    most = int(np.bincount(detections.image_id).max())
    assert most > 1000
    assert labelled["1000"]["protocol"].endswith("top 1,000 detections per image, 3 images")
    assert (
        f"top 10,000 detections per category, none cut by image (at most {most:,} per image"
        in (labelled["fixed"]["protocol"])
    )


def one_image(negative: list[int], not_exhaustive: list[int]) -> Tree:
    return {
        "images": [
            {
                "id": 1,
                "neg_category_ids": negative,
                "not_exhaustive_category_ids": not_exhaustive,
            },
            {"id": 2, "neg_category_ids": [], "not_exhaustive_category_ids": []},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500},
            {"id": 2, "image_id": 2, "category_id": 2, "bbox": [0, 0, 50, 50], "area": 2500},
        ],
        "categories": [
            {"id": 1, "name": "one", "frequency": "r"},
            {"id": 2, "name": "two", "frequency": "f"},
        ],
    }


def found(*rows: tuple[int, int, float, float]) -> Detections:
    """(image, category, left edge, score) of boxes that are 50 pixels wide and high."""
    return parse_detections(
        [
            {"image_id": image, "category_id": category, "bbox": [x, 0, 50, 50], "score": score}
            for image, category, x, score in rows
        ]
    )


@pytest.mark.parametrize(
    ("negative", "not_exhaustive", "expected"),
    [([], [], 1.0), ([2], [], 0.5), ([2], [2], 1.0)],
    ids=["unverified image is not judged", "verified negative counts", "not exhaustive is ignored"],
)
def test_federation(negative: list[int], not_exhaustive: list[int], expected: float) -> None:
    """A false detection of category 2 in image 1, scored above the true one in image 2."""
    tree = one_image(negative, not_exhaustive)
    detections = found((1, 2, 0, 0.9), (2, 2, 0, 0.8))
    assert assert_equal_to_official(tree, detections)["APf"] == pytest.approx(expected)


def test_matching_prefers_boxes_that_count_then_iou() -> None:
    """The nearer box is ignored by its flag: the farther one that counts is taken first."""
    tree = one_image([], [])
    near = {"id": 3, "image_id": 1, "category_id": 1, "bbox": [5, 0, 50, 50], "area": 2500}
    tree["annotations"].append(near | {"ignore": 1})
    detections = found((1, 1, 5, 0.9), (1, 1, 4, 0.8))
    figures = assert_equal_to_official(tree, detections)
    assert figures["APr"] is not None and 0.5 < figures["APr"] < 1


def test_annotation_id_zero_is_an_id_like_any_other() -> None:
    tree = one_image([], [])
    tree["annotations"][0]["id"] = 0
    assert assert_equal_to_official(tree, found((1, 1, 0, 0.9)))["APr"] == pytest.approx(1.0)


def figures_of(matches: Matches, protocol: Protocol) -> FederatedAP:
    return accumulate(matches, kept(matches, protocol))


def test_parts_merge_to_exactly_the_whole() -> None:
    tree = draw_annotations(7, num_images=12)
    detections, truth = disturb(tree, 8, score_decimals=1), parse_ground_truth(tree)
    whole = match(truth, detections)
    parts = []
    for ids in np.array_split(np.random.default_rng(0).permutation(truth.image_ids), 3):
        rows = np.isin(detections.image_id, ids)
        mine = Detections(
            detections.image_id[rows],
            detections.category_id[rows],
            detections.bbox[rows],
            detections.score[rows],
        )
        parts.append(match(truth.subset(ids), mine))
    merged = merge(parts)
    for protocol in (LVIS, top_of_image(3), FIXED, Protocol("few", per_category=9)):
        ours, expected = figures_of(merged, protocol), figures_of(whole, protocol)
        np.testing.assert_array_equal(ours.precision, expected.precision)
        np.testing.assert_array_equal(ours.recall, expected.recall)
        assert over_limit(merged, protocol) == over_limit(whole, protocol)
    assert over_limit(whole, top_of_image(3)) > 0 < over_limit(whole, Protocol("few", None, 9))
    assert merged.given == whole.given == len(detections)
    with pytest.raises(DataError, match="more than one part"):
        merge([*parts, parts[0]])


def test_parts_of_other_categories_do_not_merge() -> None:
    def matches(tree: Tree) -> Matches:
        return match(parse_ground_truth(tree), NOTHING)

    with pytest.raises(DataError, match="different categories"):
        merge([matches(draw_annotations(1)), matches(one_image([], []))])


def test_only_images_that_the_detector_saw_are_judged() -> None:
    tree = draw_annotations(11, num_images=10)
    everywhere = disturb(tree, 12)
    seen = np.array([100, 103, 104])
    rows = np.isin(everywhere.image_id, seen)
    some = Detections(
        everywhere.image_id[rows],
        everywhere.category_id[rows],
        everywhere.bbox[rows],
        everywhere.score[rows],
        images=seen,
    )
    assert_equal_to_official(tree, some)
    results = evaluate_detections(tree, some)
    assert (results["counts"]["images"], results["counts"]["images_annotated"]) == (3, 10)
    assert results["protocol"].endswith("3 of 10 images")
    with pytest.raises(DataError, match="detected on twice"):
        concatenate([some, some])


def test_detections_of_something_unknown() -> None:
    tree = one_image([], [])
    with pytest.raises(DataError, match=r"77 is an unknown image id \(1 of 2\)"):
        evaluate_detections(tree, found((1, 1, 0, 0.5), (77, 1, 0, 0.5)))
    with pytest.raises(DataError, match="9 is an unknown category id"):
        evaluate_detections(tree, found((1, 9, 0, 0.5)))
