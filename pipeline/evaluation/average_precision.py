"""Box AP under the protocols of data sets other than LVIS: COCO, those evaluated like it, and VOC.

COCO protocol (Lin et al. 2014): every category is judged in every image; AP is the mean of
interpolated precision at 101 recalls and 10 IoU thresholds, then over the categories that have
ground truth. RichSem evaluates OpenImages, Visual Genome and Objects365 with it (AP and AP50;
appendix D.1). Pascal VOC has rules of its own; see `voc_ap.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.annotated_boxes import AnnotatedBoxes, FoundBoxes, parse_boxes, select
from pipeline.evaluation.coco_ap import AREAS, LIMITS, COCOFigures, coco_figures
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.entries import flags, integers, refuse
from pipeline.evaluation.federated_ap import at_curve_thresholds, mean_defined
from pipeline.evaluation.ground_truth import Annotations
from pipeline.evaluation.matching import IOU_THRESHOLDS
from pipeline.evaluation.operating import Judged, operating_point, precision_recall
from pipeline.evaluation.voc_ap import MIN_OVERLAP, Year, voc_figures

if TYPE_CHECKING:
    from pipeline.evaluation.results import Results

GROUP_KEYS = ("isgroupof", "IsGroupOf")
"""OpenImages: one box around five or more things; -1 says that nobody looked."""

_COCO_STYLE = ", COCO-style (every category judged in every image, no label hierarchy)"
_ONE_PIXEL = np.array([0.0, 0.0, 1.0, 1.0])


def protocol_of(annotations: Annotations, origin: str = "annotations") -> Literal["lvis", "coco"]:
    """Which protocol a json is made for: "lvis" where images list `neg_category_ids`.

    Raises `DataError` for a tree that is neither.
    """
    for key in ("images", "annotations", "categories"):
        if not isinstance(annotations.get(key), list):
            raise DataError(
                f"{origin}: key {key!r} is missing or no list; ground truth is a COCO or LVIS json "
                "with images, annotations and categories"
            )
    images = annotations["images"]
    if not images or not all(isinstance(image, dict) for image in images):
        raise DataError(f"{origin}: images must be a list of one or more json objects")
    federated = sum("neg_category_ids" in image for image in images)
    if 0 < federated < len(images):
        raise DataError(
            f"{origin}: {federated} of {len(images)} images have neg_category_ids: LVIS gives them "
            "for all images, COCO for none. Add the missing lists or remove all."
        )
    return "lvis" if federated else "coco"


def evaluate_coco(
    annotations: Annotations,
    detections: Detections,
    *,
    origin: str,
    name: str = "COCO",
    train_image_counts: Mapping[int, int] | None = None,
    images: Sequence[int] | None = None,
    score_threshold: float | None = None,
) -> "Results":
    """COCO box AP of `detections`, overall and by category, as pycocotools computes it.

    `origin` names the annotations in errors, `name` the data set in the protocol sentence. Only
    images that the detector saw (`detections.images`) are evaluated, and of these only `images`
    where given. Annotations with `iscrowd`, and those of OpenImages that stand for a group, are
    crowd regions; `ignore` has no effect, as in pycocotools. An annotation without `area` gets
    width x height; counts and protocol say how many did. `train_image_counts` (category id ->
    training images) go into the per-category rows; without them, the counts that the annotations
    state. `score_threshold` is that of the operating point, which counts the categories that have
    an AP. Raises `DataError` for annotations that cannot be evaluated so, LVIS's among them.
    """
    _refuse_federated(annotations, origin, name)
    rows, where = annotations["annotations"], f"{origin}: annotations"
    group = np.zeros(len(rows), bool)
    for key in GROUP_KEYS:
        group |= flags(rows, key, where, (-1, 0, 1))
    whole = parse_boxes(annotations, flags(rows, "iscrowd", where) | group, origin)
    truth, found = select(whole, detections, images)
    figures = coco_figures(truth, found)
    within = _within_limit(truth, found, LIMITS[-1])
    special = {
        "crowd_regions": int(truth.ignored.sum()),
        "group_boxes": int((group & np.isin(_image_of(rows), truth.image_ids)).sum()),
        "areas_from_boxes": int((~truth.area_given).sum()),
    }
    defined = ~np.isnan(figures.precision[0, 0, :, 0])
    return {
        "protocol": _coco_sentence(name, _images(truth, whole), special),
        **_coco_summary(figures),
        **_curves(figures.precision[..., AREAS.index("all")], figures.judged, score_threshold),
        "counts": _counts(truth, whole, found, detections, within, defined) | special,
        "per_category": [
            row
            | {
                "AP": figures.ap(column=column),
                "AP50": figures.ap(iou_threshold=0.5, column=column),
                "AP75": figures.ap(iou_threshold=0.75, column=column),
                "AR": figures.ar(column=column),
            }
            for column, row in enumerate(_rows(truth, within, train_image_counts))
        ],
    }


def _coco_sentence(name: str, images: str, special: Mapping[str, int]) -> str:
    sentence = (
        f"{name} box AP{'' if name == 'COCO' else _COCO_STYLE}, IoU 0.50:0.95, "
        f"top {LIMITS[-1]} detections per image and category, {images}"
    )
    if special["group_boxes"]:
        sentence += f", group boxes taken as crowd regions: {special['group_boxes']:,}"
    if special["areas_from_boxes"]:
        sentence += f", areas taken as width x height: {special['areas_from_boxes']:,}"
    return sentence


def _coco_summary(figures: COCOFigures) -> dict[str, float | None]:
    sizes = AREAS[1:]
    return {
        "AP": figures.ap(),
        "AP50": figures.ap(iou_threshold=0.5),
        "AP75": figures.ap(iou_threshold=0.75),
        **{f"AP{area[0]}": figures.ap(area) for area in sizes},
        **dict.fromkeys(("APr", "APc", "APf")),
        **{f"AR@{limit}": figures.ar(limit=limit) for limit in LIMITS},
        **{f"AR{area[0]}@{LIMITS[-1]}": figures.ar(area) for area in sizes},
    }


def _curves(
    precision: NDArray[np.float64], judged: Judged, score_threshold: float | None
) -> dict[str, Any]:
    """Operating point and curves, with the keys of LVIS results; no other limits, no frequencies.

    `precision` is (10 IoU thresholds, 101 recalls, C).
    """
    point = operating_point(judged, score_threshold)
    columns = np.arange(precision.shape[-1])
    return {
        "protocols": {},
        "operating_point": None if point is None else point.to_json(),
        "curves": precision_recall(at_curve_thresholds(precision), {"all": columns}),
    }


def evaluate_voc(
    annotations: Annotations,
    detections: Detections,
    *,
    origin: str,
    year: Year,
    box_size: Literal["pixels", "difference"] = "pixels",
    train_image_counts: Mapping[int, int] | None = None,
    images: Sequence[int] | None = None,
    score_threshold: float | None = None,
) -> "Results":
    """Pascal VOC box AP at IoU 0.5, overall and by category, by the development kit's rules.

    `year` 2007 is the mean of 11 precisions, 2010 the area under the curve of that and later years.
    Annotations with `difficult` (or `ignore`) neither count as missed nor make a detection wrong.
    With `box_size` "pixels" w = xmax - xmin + 1 (a COCO box covers its pixels); some converters
    write the "difference" xmax - xmin: then both sides' boxes are taken one pixel wider and higher.
    AP50 is AP; what VOC does not define is None. The other arguments, and `DataError`, are those of
    `evaluate_coco`.
    """
    assert year in (2007, 2010) and box_size in ("pixels", "difference")
    _refuse_federated(annotations, origin, f"VOC{year}")
    rows, where = annotations["annotations"], f"{origin}: annotations"
    ids = integers(rows, "id", where)
    rule = "is a crowd: Pascal VOC has none; mark what shall not count as `difficult`"
    refuse(flags(rows, "iscrowd", where), ids, rule, where)
    difficult = flags(rows, "difficult", where) | flags(rows, "ignore", where)
    whole = parse_boxes(annotations, difficult, origin)
    truth, found = select(whole, detections, images)
    if box_size == "difference":
        truth = replace(truth, bbox=truth.bbox + _ONE_PIXEL)
        found = replace(found, bbox=found.bbox + _ONE_PIXEL)
    figures = voc_figures(truth, found, year)
    average = figures.average
    overall = mean_defined(average)
    precision = np.full((len(IOU_THRESHOLDS), *figures.curves.shape), np.nan)
    precision[IOU_THRESHOLDS == MIN_OVERLAP] = figures.curves
    within = _within_limit(truth, found, None)
    form = "11 recalls" if year == 2007 else "area under the curve"
    sentence = (
        f"Pascal VOC box AP, VOC{year} rule ({form}), IoU {MIN_OVERLAP:.2f}, all detections, "
        f"{_images(truth, whole)}"
    )
    if box_size == "difference":
        sentence += ", boxes one pixel wider and higher than given"
    counts = _counts(truth, whole, found, detections, within, ~np.isnan(average))
    return {
        "protocol": sentence,
        "AP": overall,
        "AP50": overall,
        **dict.fromkeys(("AP75", "APs", "APm", "APl", "APr", "APc", "APf")),
        **_curves(precision, figures.judged, score_threshold),
        "counts": counts | {"difficult": int(truth.ignored.sum())},
        "per_category": [
            row | {"AP": mean_defined(one), "AP50": mean_defined(one), "AP75": None, "AR": None}
            for row, one in zip(
                _rows(truth, within, train_image_counts), average[:, None], strict=True
            )
        ],
    }


def _refuse_federated(annotations: Annotations, origin: str, name: str) -> None:
    if protocol_of(annotations, origin) == "lvis":
        raise DataError(
            f"{origin}: the images have neg_category_ids, so that each was verified for some "
            f"categories only; {name} AP would count detections of all others as false positives. "
            "Evaluate these annotations under the LVIS protocol."
        )


def _image_of(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    return np.array([row["image_id"] for row in rows], np.int64)


def _images(truth: AnnotatedBoxes, whole: AnnotatedBoxes) -> str:
    number, annotated = len(truth.image_ids), len(whole.image_ids)
    return f"{number:,} images" if number == annotated else f"{number:,} of {annotated:,} images"


def _within_limit(truth: AnnotatedBoxes, found: FoundBoxes, limit: int | None) -> NDArray[np.int64]:
    """How many detections of each column count, (C,), if `limit` do in each image."""
    size = truth.num_categories
    pair, number = np.unique(found.image * size + found.column, return_counts=True)
    within = np.zeros(size, np.int64)
    np.add.at(within, pair % max(size, 1), number if limit is None else np.minimum(number, limit))
    return within


def _counts(
    truth: AnnotatedBoxes,
    whole: AnnotatedBoxes,
    found: FoundBoxes,
    detections: Detections,
    within: NDArray[np.int64],
    defined: NDArray[np.bool_],
) -> dict[str, Any]:
    """`defined` (C,): the categories that have an AP; only their detections are counted."""
    return {
        "images": len(truth.image_ids),
        "images_annotated": len(whole.image_ids),
        "instances": int((~truth.ignored).sum()),
        "categories": truth.num_categories,
        "categories_with_ground_truth": {"all": int(defined.sum()), "r": 0, "c": 0, "f": 0},
        "detections": len(detections),
        "detections_elsewhere": len(detections) - len(found.score),
        "detections_over_limit": len(found.score) - int(within.sum()),
        "detections_counted": int(within[defined].sum()),
    }


def _rows(
    truth: AnnotatedBoxes, within: NDArray[np.int64], train_image_counts: Mapping[int, int] | None
) -> list[dict[str, Any]]:
    """What is known of each category before its AP; boxes that are ignored are not instances."""
    size, counted = truth.num_categories, ~truth.ignored
    image, column = truth.image[counted], truth.column[counted]
    images = np.bincount(np.unique(image * size + column) % max(size, 1), minlength=size).tolist()
    instances = np.bincount(column, minlength=size).tolist()
    rows = []
    for position, category_id in enumerate(truth.category_ids.tolist()):
        stated = int(truth.image_counts[position])
        train_images = stated if stated >= 0 else None
        if train_image_counts is not None:
            train_images = train_image_counts.get(category_id, 0)
        rows.append(
            {
                "category_id": category_id,
                "name": truth.names[position],
                "frequency": None,
                "train_images": train_images,
                "images": images[position],
                "instances": instances[position],
                "detections": int(within[position]),
            }
        )
    return rows
