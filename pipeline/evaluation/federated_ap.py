"""LVIS box AP on sparse arrays: only (image, category) pairs that count are ever visited.

The protocol (Gupta et al. 2019, "LVIS", section 3; challenge rules): in each image only categories
that are annotated or verified absent count; unmatched detections of a category that is not
annotated exhaustively are ignored; the best 300 detections an image over all categories; AP is the
mean of interpolated precision at 101 recalls and 10 IoU thresholds, then over the categories that
have ground truth. Every figure equals the official package's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.ground_truth import GroundTruth, positions, refuse

AREA_RANGES = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""Square pixels, both ends included."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 300

_STATES = len(AREA_RANGES) * len(IOU_THRESHOLDS)
# A detection needs this overlap, whatever the threshold: 1 itself must stay reachable.
_FLOORS = np.tile(np.minimum(IOU_THRESHOLDS, 1 - 1e-10), len(AREA_RANGES))


@dataclass(frozen=True, slots=True)
class Matches:
    """What is left of some images after matching; parts of a data set merge to exactly the whole.

    One row a counted detection: `image_id`, `column`, `score`, `rank` (its place among the image's
    detections), and `true_positive` and `ignored`, (D, 5) uint8: packed bits of the 4 area ranges x
    10 IoU thresholds. One row a ground-truth box: `truth_image_id`, `truth_column`, and
    `truth_counts` (N, 4) bool, whether it counts in each area range. `image_ids` are all images
    seen. `given` and `over_limit` count detections before and beyond the cap per image.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    image_id: NDArray[np.int64]
    column: NDArray[np.int64]
    score: NDArray[np.float64]
    rank: NDArray[np.int64]
    true_positive: NDArray[np.uint8]
    ignored: NDArray[np.uint8]
    truth_image_id: NDArray[np.int64]
    truth_column: NDArray[np.int64]
    truth_counts: NDArray[np.bool_]
    given: int
    over_limit: int


@dataclass(frozen=True, slots=True)
class FederatedAP:
    """`precision` (10 thresholds, 101 recalls, C, 4 areas) and `recall` (10, C, 4); NaN where a
    category has no ground truth in the area range."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

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
        return _mean(part if columns is None else part[..., columns])

    def ar(self, area: str = "all", columns: NDArray[np.int64] | None = None) -> float | None:
        """Mean of the largest recall over IoU thresholds and categories, or None."""
        part = self.recall[..., list(AREA_RANGES).index(area)]
        return _mean(part if columns is None else part[..., columns])


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def match(
    truth: GroundTruth, detections: Detections, max_detections: int = MAX_DETECTIONS
) -> Matches:
    """Match the detections of each image to its ground truth.

    Raises `DataError` for a detection whose image or category the annotations do not have.
    """
    image = positions(truth.image_ids, detections.image_id, "image", "detections")
    column = positions(truth.category_ids, detections.category_id, "category", "detections")
    rank = _rank(image, detections.score)
    area = detections.bbox[:, 2] * detections.bbox[:, 3]
    # Boxes without area never count, on either side; they do use up places under the cap.
    real = (truth.area > 0) & np.isfinite(truth.area)
    truth_pair = truth.pair(truth.image, truth.column)
    pair = truth.pair(image, column)
    counted = (rank < max_detections) & (area > 0) & np.isfinite(area)
    counted &= np.isin(pair, np.union1d(truth_pair[real], truth.negative))

    rows = np.flatnonzero(counted)
    rows = rows[np.lexsort((rank[rows], pair[rows]))]
    boxes = np.flatnonzero(real)
    boxes = boxes[np.argsort(truth_pair[boxes], kind="stable")]
    ignored_truth = truth.ignored[boxes, None] | _outside(truth.area[boxes])
    matched, ignored = _match_pairs(
        (pair[rows], detections.bbox[rows]), (truth_pair[boxes], truth.bbox[boxes]), ignored_truth
    )
    excused = _outside(area[rows]) | np.isin(pair[rows], truth.not_exhaustive)[:, None]
    ignored |= ~matched & np.repeat(excused, len(IOU_THRESHOLDS), axis=1)
    return Matches(
        image_ids=truth.image_ids,
        category_ids=truth.category_ids,
        image_id=detections.image_id[rows],
        column=column[rows],
        score=detections.score[rows],
        rank=rank[rows],
        true_positive=np.packbits(matched & ~ignored, axis=1),
        ignored=np.packbits(ignored, axis=1),
        truth_image_id=truth.image_ids[truth.image[boxes]],
        truth_column=truth.column[boxes],
        truth_counts=~ignored_truth,
        given=len(detections),
        over_limit=int((rank >= max_detections).sum()),
    )


def _rank(image: NDArray[np.int64], score: NDArray[np.float64]) -> NDArray[np.int64]:
    """Each detection's place in its image by score; ties keep the order of the list."""
    order = np.lexsort((-score, image))
    ordered = image[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else order
    sizes = np.diff(np.r_[first, len(order)])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(first, sizes)
    return rank


def _outside(area: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) areas -> (N, 4), True where an area is outside the range."""
    low, high = np.array(list(AREA_RANGES.values())).T
    outside: NDArray[np.bool_] = (area[:, None] < low) | (area[:, None] > high)
    return outside


Boxes = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Pair key and xywh box of each row, rows ascending by pair key."""


def _match_pairs(
    found: Boxes, truth: Boxes, ignored_truth: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Greedy matching in every pair, area range and threshold at once.

    In round r each pair's r-th detection that overlaps anything takes its box: one that counts
    before one that is ignored, then the largest IoU, then the last in the file. Returns (D, 40)
    bool: matched, and matched to an ignored box.
    """
    detection, box, iou = _overlaps(found, truth)
    place = _place_in_pair(found[0], detection)
    # Within a detection the best edge comes last, so that the largest position wins.
    order = np.lexsort((box, iou, detection, place))
    detection, box, iou, place = detection[order], box[order], iou[order], place[order]

    matched = np.zeros((len(found[0]), _STATES), bool)
    ignored = np.zeros_like(matched)
    taken = np.zeros((len(truth[0]), _STATES), bool)
    ignored_states = np.repeat(ignored_truth, len(IOU_THRESHOLDS), axis=1)
    states = np.arange(_STATES)
    bounds = np.searchsorted(place, np.arange(place[-1] + 2)) if len(place) else np.zeros(1, int)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        edges, count = box[start:stop], stop - start
        free = (iou[start:stop, None] >= _FLOORS) & ~taken[edges]
        value = np.arange(count)[:, None] + np.where(ignored_states[edges], 0, count)
        first = np.flatnonzero(np.r_[True, np.diff(detection[start:stop]) > 0])
        best = np.maximum.reduceat(np.where(free, value, -1), first, axis=0)
        hit, state = np.nonzero(best >= 0)
        chosen = edges[best[hit, state] % count]
        rows = detection[start:stop][first][hit]
        matched[rows, states[state]] = True
        ignored[rows, state] = ignored_states[chosen, state]
        taken[chosen, state] = True
    return matched, ignored


def _overlaps(
    found: Boxes, truth: Boxes
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Detection row, ground-truth row and IoU of all that can match at the lowest threshold."""
    first = np.searchsorted(truth[0], found[0], side="left")
    sizes = np.searchsorted(truth[0], found[0], side="right") - first
    detection = np.repeat(np.arange(len(found[0])), sizes)
    box = np.arange(len(detection)) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)
    a, b = found[1][detection], truth[1][box]
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    size = np.maximum(high - low, 0)
    intersection = size[:, 0] * size[:, 1]
    # The order of these operations is pycocotools', so that the IoU is equal to the last bit.
    iou = intersection / (a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - intersection)
    near = iou >= _FLOORS.min()
    return detection[near], box[near], iou[near]


def _place_in_pair(pair: NDArray[np.int64], detection: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each edge, the place of its detection among the pair's detections that have an edge."""
    rows, edge = np.unique(detection, return_inverse=True)
    owner = pair[rows]
    place = np.arange(len(rows)) - np.searchsorted(owner, owner)
    return place[edge].astype(np.int64)


def merge(parts: Sequence[Matches]) -> Matches:
    """One result out of the parts of several ranks; an image in two parts is a `DataError`."""
    assert parts, "nothing to merge"
    first = parts[0]
    for part in parts[1:]:
        if not np.array_equal(part.category_ids, first.category_ids):
            raise DataError("partial results have different categories; evaluate one data set")
    image_ids, count = np.unique(
        np.concatenate([part.image_ids for part in parts]), return_counts=True
    )
    refuse(count > 1, image_ids, "is an image of more than one part", "partial results")
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (
            "image_id", "column", "score", "rank", "true_positive", "ignored",
            "truth_image_id", "truth_column", "truth_counts",
        )
    }  # fmt: skip
    return replace(
        first,
        image_ids=image_ids,
        given=sum(part.given for part in parts),
        over_limit=sum(part.over_limit for part in parts),
        **joined,
    )


def accumulate(matches: Matches) -> FederatedAP:
    """Precision and recall of every category, IoU threshold and area range."""
    num_categories, num_areas = len(matches.category_ids), len(AREA_RANGES)
    num_thresholds, num_recalls = len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS)
    precision = np.full((num_thresholds, num_recalls, num_categories, num_areas), np.nan)
    recall = np.full((num_thresholds, num_categories, num_areas), np.nan)
    num_truth = np.zeros((num_categories, num_areas), np.int64)
    np.add.at(num_truth, matches.truth_column, matches.truth_counts)
    # Ties in score: the smaller image id first, then the image's own order.
    order = np.lexsort((matches.rank, matches.image_id, -matches.score, matches.column))
    bounds = np.searchsorted(matches.column[order], np.arange(num_categories + 1))
    for column in np.flatnonzero(num_truth.any(1)).tolist():
        rows = order[bounds[column] : bounds[column + 1]]
        hits = np.unpackbits(matches.true_positive[rows], axis=1, count=_STATES)
        ignored = np.unpackbits(matches.ignored[rows], axis=1, count=_STATES)
        true = np.cumsum(hits, axis=0, dtype=np.float64).T
        false = np.cumsum((hits | ignored) == 0, axis=0, dtype=np.float64).T
        for area in np.flatnonzero(num_truth[column]).tolist():
            part = slice(area * num_thresholds, (area + 1) * num_thresholds)
            curve, reached = _interpolate(true[part], false[part], int(num_truth[column, area]))
            precision[:, :, column, area] = curve
            recall[:, column, area] = reached
    return FederatedAP(precision, recall)


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
