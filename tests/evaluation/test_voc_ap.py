"""Pascal VOC AP against the rules written down as loops, and against figures worked out by hand."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exhaustive_scenes import draw_exhaustive, one_category
from federated_scenes import Tree, disturb
from hypothesis import given, settings
from hypothesis import strategies as st
from voc_rules import Corners, Year, corners, slow_ap

from pipeline.errors import DataError
from pipeline.evaluation.average_precision import evaluate_voc
from pipeline.evaluation.detections import Detections, parse_detections


def slow(tree: Tree, detections: Detections, year: Year, extra: int = 0) -> dict[int, float | None]:
    """AP of each class of a COCO-form tree; `extra` pixels are added to each box's far corner."""
    averages = {}
    for category in tree["categories"]:
        objects: dict[int, list[tuple[Corners, bool]]] = {}
        for row in tree["annotations"]:
            if row["category_id"] == category["id"]:
                flag = bool(row.get("difficult", 0) or row.get("ignore", 0))
                objects.setdefault(row["image_id"], []).append((corners(row["bbox"], extra), flag))
        found = [
            (row["image_id"], row["score"], corners(row["bbox"], extra))
            for row in detections.to_rows()
            if row["category_id"] == category["id"]
        ]
        averages[category["id"]] = slow_ap(objects, found, year)
    return averages


def assert_equal_to_slow(
    tree: Tree, detections: Detections, year: Year, **keywords: Any
) -> dict[str, Any]:
    results = evaluate_voc(tree, detections, origin="x", year=year, **keywords)
    extra = 1 if keywords.get("box_size") == "difference" else 0
    expected = slow(tree, detections, year, extra)
    for row in results["per_category"]:
        value = expected[row["category_id"]]
        assert row["AP"] == (None if value is None else pytest.approx(value, abs=1e-12, rel=0))
        assert row["AP50"] == row["AP"]
    defined = [value for value in expected.values() if value is not None]
    mean = pytest.approx(np.mean(defined), abs=1e-12) if defined else None
    assert results["AP"] == results["AP50"] == mean
    return results


def whole_pixels(tree: Tree, detections: Detections) -> Detections:
    """Boxes on whole pixels, where overlaps tie and are exactly a half."""
    for row in tree["annotations"]:
        row["bbox"] = np.ceil(row["bbox"]).tolist()
    bbox = np.ceil(detections.bbox)
    return Detections(detections.image_id, detections.category_id, bbox, detections.score)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 10),
    copies=st.integers(0, 4),
    decimals=st.integers(0, 3),
    grid=st.sampled_from([0, 10, 20]),
    flag=st.sampled_from(["difficult", "ignore"]),
    year=st.sampled_from([2007, 2010]),
    box_size=st.sampled_from(["pixels", "difference"]),
)
def test_random_scenes_with_ties_and_difficult_objects(
    seed: int,
    images: int,
    copies: int,
    decimals: int,
    grid: int,
    flag: str,
    year: Year,
    box_size: str,
) -> None:
    tree = draw_exhaustive(seed, images, 4, grid, flag)
    detections = disturb(tree, seed + 1, copies, decimals, grid)
    if seed % 2:
        detections = whole_pixels(tree, detections)
    assert_equal_to_slow(tree, detections, year, box_size=box_size)


def found(*rows: tuple[int, list[float], float]) -> Detections:
    """(image, box, score) of the category 7."""
    return parse_detections(
        [
            {"image_id": image, "category_id": 7, "bbox": box, "score": score}
            for image, box, score in rows
        ]
    )


def by_hand() -> tuple[Tree, Detections]:
    """Two objects that count, A in image 1 and C in image 2, and a difficult one, B in image 1."""
    tree = one_category(
        {"image_id": 1, "bbox": [0, 0, 10, 10]},
        {"image_id": 1, "bbox": [100, 0, 10, 10], "difficult": 1},
        {"image_id": 2, "bbox": [0, 0, 10, 10], "difficult": 0},
    )
    detections = found(
        (1, [0, 0, 10, 10], 0.9),  # A: true; recall 1/2, precision 1
        (1, [0, 0, 10, 9], 0.8),  # A again: false; 1/2, 1/2
        (1, [100, 0, 10, 10], 0.7),  # B: neither
        (2, [50, 50, 10, 10], 0.6),  # nothing there: false; 1/2, 1/3
        (2, [0, 0, 10, 5], 0.5),  # C, 50 of 100 pixels: true; 1, 2/4
    )
    return tree, detections


@pytest.mark.parametrize(
    ("year", "expected", "form"),
    [
        # Recalls 0 to 0.5 have precision 1, 0.6 to 1.0 have 1/2: (6 + 5 / 2) / 11.
        (2007, 8.5 / 11, "VOC2007 rule (11 recalls)"),
        # Half of the recall at precision 1, half at 1/2.
        (2010, 0.75, "VOC2010 rule (area under the curve)"),
    ],
)
def test_figures_worked_out_by_hand(year: Year, expected: float, form: str) -> None:
    tree, detections = by_hand()
    results = assert_equal_to_slow(tree, detections, year)
    assert results["AP"] == pytest.approx(expected, abs=1e-12)
    assert results["protocol"] == f"Pascal VOC box AP, {form}, IoU 0.50, all detections, 2 images"
    undefined = ("AP75", "APs", "APm", "APl", "APr", "APc", "APf")
    assert [results[key] for key in undefined] == [None] * 7
    counts = results["counts"]
    assert (counts["instances"], counts["difficult"], counts["detections_counted"]) == (2, 1, 5)


def test_a_detection_belongs_to_its_best_object_though_another_is_free() -> None:
    """Two objects that overlap: the second detection is nearer to the one that is taken."""
    tree = one_category(
        {"image_id": 1, "bbox": [0, 0, 100, 10]}, {"image_id": 1, "bbox": [20, 0, 100, 10]}
    )
    detections = found((1, [0, 0, 100, 10], 0.9), (1, [5, 0, 100, 10], 0.8))
    # COCO's rule would give the second object to the second detection, and AP 1.
    assert assert_equal_to_slow(tree, detections, 2010)["AP"] == pytest.approx(0.5)


def test_of_equal_overlaps_the_first_object_and_of_equal_scores_the_first_detection() -> None:
    objects = ({"image_id": 1, "bbox": [0, 0, 10, 10]}, {"image_id": 1, "bbox": [4, 0, 10, 10]})
    between = (1, [2.0, 0, 10, 10], 0.5)
    right = (1, [4.0, 0, 10, 10], 0.4)
    # The first takes the left object, so that the right one is free for the second.
    assert assert_equal_to_slow(one_category(*objects), found(between, right), 2010)["AP"] == 1.0
    swapped = one_category(*reversed(objects))
    assert assert_equal_to_slow(swapped, found(between, right), 2010)["AP"] == 0.5

    tree = one_category({"image_id": 2, "bbox": [0, 0, 10, 10]})
    true, false = (2, [0.0, 0, 10, 10], 0.5), (1, [0.0, 0, 10, 10], 0.5)
    assert assert_equal_to_slow(tree, found(true, false), 2010)["AP"] == 1.0
    assert assert_equal_to_slow(tree, found(false, true), 2010)["AP"] == 0.5


def test_boxes_whose_width_is_a_difference_of_inclusive_coordinates() -> None:
    tree = one_category({"image_id": 1, "bbox": [0, 0, 9, 9]})
    narrow = found((1, [0, 0, 9, 4], 0.9))  # 36 of 81, or 50 of 100 pixels
    assert assert_equal_to_slow(tree, narrow, 2010)["AP"] == 0.0
    results = assert_equal_to_slow(tree, narrow, 2010, box_size="difference")
    assert results["AP"] == 1.0
    assert results["protocol"].endswith(", boxes one pixel wider and higher than given")


def test_a_recall_of_three_tenths_misses_the_fourth_level_of_2007() -> None:
    boxes = [{"image_id": 1, "bbox": [20 * i, 0, 10, 10]} for i in range(10)]
    for number, levels in ((2, 3), (3, 3), (4, 5), (6, 7), (7, 8), (10, 11)):
        detections = found(*((1, box["bbox"], 0.9) for box in boxes[:number]))  # type: ignore[misc]
        results = assert_equal_to_slow(one_category(*boxes), detections, 2007)
        assert results["AP"] == pytest.approx(levels / 11, abs=1e-12), number


@pytest.mark.parametrize("year", [2007, 2010])
def test_difficult_objects_alone_define_nothing(year: Year) -> None:
    tree, detections = by_hand()
    for row in tree["annotations"]:
        row["difficult"] = True
    results = assert_equal_to_slow(tree, detections, year)
    assert results["AP"] is None
    assert results["counts"]["categories_with_ground_truth"]["all"] == 0
    # One object counts, and all that was found lies on a difficult one: nothing was right.
    tree["annotations"][2]["difficult"] = False
    only = found((1, [100, 0, 10, 10], 0.7))
    assert assert_equal_to_slow(tree, only, year)["AP"] == 0.0


def test_flags_that_voc_does_not_have() -> None:
    tree, detections = by_hand()
    tree["annotations"][0]["iscrowd"] = 1
    with pytest.raises(
        DataError, match=r"x: annotations: 1 is a crowd: Pascal VOC has none.*\(1 of 3\)"
    ):
        evaluate_voc(tree, detections, origin="x", year=2007)
    tree["annotations"][0].update(iscrowd=0, difficult="0")
    with pytest.raises(DataError, match=r"difficult must be one of the numbers 0, 1; .*\(1 of 3\)"):
        evaluate_voc(tree, detections, origin="x", year=2007)


def test_boxes_without_area_are_found_by_nothing() -> None:
    tree = one_category(
        {"image_id": 1, "bbox": [5, 5, 0, 9]}, {"image_id": 1, "bbox": [0, 0, 9, 9]}
    )
    detections = found((1, [5, 5, 0, 9], 0.9), (1, [0, 0, 9, 9], 0.8))
    results = evaluate_voc(tree, detections, origin="x", year=2010)
    assert results["AP"] == pytest.approx(0.25)


def read_voc(folder: Path, extra: int) -> tuple[Tree, dict[str, dict[int, list[Any]]]]:
    """Xml files in COCO form, w = xmax - xmin + `extra`, and class -> image -> objects."""
    tree: Tree = {"images": [], "annotations": [], "categories": []}
    objects: dict[str, dict[int, list[Any]]] = {}
    for image_id, path in enumerate(sorted(folder.glob("*.xml"))):
        tree["images"].append({"id": image_id, "file_name": path.stem + ".jpg"})
        for one in ElementTree.parse(path).iterfind("object"):
            box = [float(one.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin")]
            far = [float(one.findtext(f"bndbox/{key}", "")) for key in ("xmax", "ymax")]
            difficult = one.findtext("difficult") == "1"
            name = one.findtext("name", "")
            objects.setdefault(name, {}).setdefault(image_id, []).append(((*box, *far), difficult))
            size = [high - low + extra for low, high in zip(box, far, strict=True)]
            tree["annotations"].append(
                {
                    "id": len(tree["annotations"]),
                    "image_id": image_id,
                    "category_id": sorted(objects).index(name),
                    "name": name,
                    "bbox": [box[0] - 1, box[1] - 1, *size],
                    "difficult": int(difficult),
                }
            )
    names = sorted(objects)
    tree["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    for row in tree["annotations"]:
        row["category_id"] = names.index(row["name"])
    return tree, objects


@pytest.mark.parametrize("year", [2007, 2010])
@pytest.mark.parametrize("folder", ["VOC2007", "VOC2012"])
def test_real_annotations(shared_data: Path, folder: str, year: Year) -> None:
    """The loops read the xml's own coordinates, so that the conversion is part of the test."""
    annotations = shared_data / "voc" / "VOCdevkit" / folder / "Annotations"
    tree, objects = read_voc(annotations, extra=1)
    assert len(tree["images"]) == 5 and tree["annotations"]
    noisy = disturb({**tree}, 3, copies=4, score_decimals=1)
    detections = whole_pixels({"annotations": []}, noisy)
    results = assert_equal_to_slow(tree, detections, year)
    rows = list(detections.to_rows())
    for row in results["per_category"]:
        mine = [
            (one["image_id"], one["score"], corners(one["bbox"]))
            for one in rows
            if one["category_id"] == row["category_id"]
        ]
        expected = slow_ap(objects[row["name"]], mine, year)
        assert row["AP"] == (None if expected is None else pytest.approx(expected, abs=1e-12))
    assert 0.1 < results["AP"] < 1.0


@pytest.mark.parametrize("year", [2007, 2010])
def test_a_real_detector(shared_data: Path, year: Year) -> None:
    """Its boxes, as those of many converters, have w = xmax - xmin."""
    folder = shared_data / "voc" / "voc2012_100"
    if not folder.is_dir():
        pytest.skip(f"no detector output at {folder}")
    tree, _ = read_voc(folder / "gts" / "pascalvoc_format", extra=0)
    stored = json.loads((folder / "dets" / "coco_format" / "coco_dets.json").read_text())
    images = {row["file_name"]: row["id"] for row in tree["images"]}
    files = {row["id"]: row["file_name"] for row in stored["images"]}
    names = {row["name"]: row["id"] for row in tree["categories"]}
    categories = {row["id"]: row["name"] for row in stored["categories"]}
    detections = parse_detections(
        [
            {
                "image_id": images[files[row["image_id"]]],
                "category_id": names[categories[row["category_id"]]],
                "bbox": [row["bbox"][0] - 1, row["bbox"][1] - 1, *row["bbox"][2:]],
                "score": row["score"],
            }
            for row in stored["annotations"]
        ]
    )
    results = assert_equal_to_slow(tree, detections, year, box_size="difference")
    assert results["AP"] > 0.3
