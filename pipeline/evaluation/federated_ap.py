"""LVIS box AP: from matches to precision and recall, under several limits in one pass.

AP is the mean of interpolated precision at 101 recalls and 10 IoU thresholds, then over the
categories that have ground truth (Gupta et al. 2019, "LVIS"; challenge rules). With the best 300
detections an image every figure equals the official package's.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.matching import AREA_RANGES, IOU_THRESHOLDS, NUM_STATES, Matches

RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
CURVE_THRESHOLDS = {"0.50": 0.5, "0.75": 0.75, "0.50:0.95": None}
"""IoU of the precision-recall curves that are kept; None is the mean over all thresholds."""
MAX_DETECTIONS = 300


@dataclass(frozen=True, slots=True)
class Protocol:
    """Which detections count: the best of each image, or of each category over the data set."""

    name: str
    per_image: int | None = None
    per_category: int | None = None

    def __str__(self) -> str:
        if self.per_category is not None:
            return f"fixed AP: top {self.per_category:,} detections per category, none cut by image"
        return f"top {self.per_image:,} detections per image"


def top_of_image(number: int) -> Protocol:
    """The best `number` detections of each image, over all categories."""
    return Protocol(str(number), per_image=number)


FIXED = Protocol("fixed", per_category=10_000)
"""Dave et al. 2021, "Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details"."""
LVIS, LVIS_1000 = top_of_image(MAX_DETECTIONS), top_of_image(1000)


@dataclass(frozen=True, slots=True)
class FederatedAP:
    """`precision` (10 thresholds, C, 4 areas), the mean over recalls; `recall` (10, C, 4), the
    largest; `curves` (3, 101 recalls, C), precision over all areas at `CURVE_THRESHOLDS`.

    NaN where a category has no ground truth in the area range.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    curves: NDArray[np.float64]

    def ap(
        self,
        area: str = "all",
        iou_threshold: float | None = None,
        columns: NDArray[np.int64] | None = None,
    ) -> float | None:
        """Mean precision over categories that are defined, or None where none is."""
        part = self.precision[..., list(AREA_RANGES).index(area)]
        if iou_threshold is not None:
            part = part[IOU_THRESHOLDS == iou_threshold]
            assert len(part) == 1, f"{iou_threshold} is none of the IoU thresholds"
        return mean_defined(part if columns is None else part[:, columns])

    def ar(self, area: str = "all", columns: NDArray[np.int64] | None = None) -> float | None:
        """Mean of the largest recall over IoU thresholds and categories, or None."""
        part = self.recall[..., list(AREA_RANGES).index(area)]
        return mean_defined(part if columns is None else part[:, columns])


def mean_defined(values: NDArray[np.float64]) -> float | None:
    """Mean of what is not NaN, or None where nothing is left."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def kept(matches: Matches, protocol: Protocol) -> NDArray[np.bool_]:
    """Which counted detections a protocol leaves, (D,).

    Of equal scores at a category's limit, those of the smaller image id stay, then those that come
    first in their image.
    """
    if protocol.per_image is not None:
        return matches.rank < protocol.per_image
    assert protocol.per_category is not None
    keep = np.ones(len(matches.rank), bool)
    size = len(matches.category_ids)
    total = np.bincount(matches.column, minlength=size)
    total += np.bincount(matches.other_column, minlength=size)
    for column in np.flatnonzero(total > protocol.per_category).tolist():
        rows = np.flatnonzero(matches.column == column)
        others = matches.other_column == column
        order = np.lexsort(
            (
                np.concatenate([matches.rank[rows], matches.other_rank[others]]),
                np.concatenate([matches.image_id[rows], matches.other_image_id[others]]),
                -np.concatenate([matches.score[rows], matches.other_score[others]]),
            )
        )
        beyond = order[protocol.per_category :]
        keep[rows[beyond[beyond < len(rows)]]] = False
    return keep


def over_limit(matches: Matches, protocol: Protocol) -> int:
    """How many of all detections a protocol cuts."""
    if protocol.per_image is not None:
        ranks = (matches.rank, matches.other_rank)
        return sum(int((rank >= protocol.per_image).sum()) for rank in ranks)
    assert protocol.per_category is not None
    size = len(matches.category_ids)
    total = np.bincount(matches.column, minlength=size)
    total += np.bincount(matches.other_column, minlength=size)
    return int(np.maximum(total - protocol.per_category, 0).sum())


def accumulate(matches: Matches, keep: NDArray[np.bool_]) -> FederatedAP:
    """Precision and recall of every category, IoU threshold and area range.

    `keep` (D,) says which detections are judged; see `kept`.
    """
    num_categories, num_areas = len(matches.category_ids), len(AREA_RANGES)
    num_thresholds, num_recalls = len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS)
    precision = np.full((num_thresholds, num_categories, num_areas), np.nan)
    recall = np.full((num_thresholds, num_categories, num_areas), np.nan)
    curves = np.full((len(CURVE_THRESHOLDS), num_recalls, num_categories), np.nan)
    num_truth = np.zeros((num_categories, num_areas), np.int64)
    np.add.at(num_truth, matches.truth_column, matches.truth_counts)
    # Ties in score: the smaller image id first, then the image's own order.
    order = np.lexsort((matches.rank, matches.image_id, -matches.score, matches.column))
    order = order[keep[order]]
    bounds = np.searchsorted(matches.column[order], np.arange(num_categories + 1))
    for column in np.flatnonzero(num_truth.any(1)).tolist():
        rows = order[bounds[column] : bounds[column + 1]]
        hits = np.unpackbits(matches.true_positive[rows], axis=1, count=NUM_STATES)
        ignored = np.unpackbits(matches.ignored[rows], axis=1, count=NUM_STATES)
        true = np.cumsum(hits, axis=0, dtype=np.float64).T
        false = np.cumsum((hits | ignored) == 0, axis=0, dtype=np.float64).T
        for area in np.flatnonzero(num_truth[column]).tolist():
            part = slice(area * num_thresholds, (area + 1) * num_thresholds)
            curve, reached = _interpolate(true[part], false[part], int(num_truth[column, area]))
            precision[:, column, area] = curve.mean(axis=1)
            recall[:, column, area] = reached
            if area == 0:
                curves[:, :, column] = at_curve_thresholds(curve)
    return FederatedAP(precision, recall, curves)


def at_curve_thresholds(precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """(10 IoU thresholds, ...) to (3, ...), at `CURVE_THRESHOLDS`."""
    rows = [
        precision.mean(axis=0) if iou is None else precision[np.argmax(IOU_THRESHOLDS == iou)]
        for iou in CURVE_THRESHOLDS.values()
    ]
    return np.stack(rows)


def _interpolate(
    true: NDArray[np.float64], false: NDArray[np.float64], num_truth: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cumulated (T, D) counts -> precision at the recall thresholds (T, 101), last recall (T,)."""
    curve = np.zeros((len(true), len(RECALL_THRESHOLDS)))
    if not true.shape[1]:
        return curve, np.zeros(len(true))
    recall = true / num_truth
    precision = true / (false + true + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    for threshold in range(len(true)):
        place = np.searchsorted(recall[threshold], RECALL_THRESHOLDS, side="left")
        inside = place < true.shape[1]
        curve[threshold, inside] = envelope[threshold, place[inside]]
    return curve, recall[:, -1]
