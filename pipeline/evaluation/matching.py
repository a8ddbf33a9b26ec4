"""Matching of detections to boxes under the federated protocol, in sparse arrays.

In each image only categories that are annotated or verified absent count; unmatched detections of
a category that is not annotated exhaustively are ignored (Gupta et al. 2019, "LVIS", section 3).
Only (image, category) pairs that count are ever visited.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.entries import positions, refuse
from pipeline.evaluation.ground_truth import GroundTruth

AREA_RANGES = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""Square pixels, both ends included."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)

NUM_STATES = len(AREA_RANGES) * len(IOU_THRESHOLDS)
_BLOCK = 1 << 15
# A detection needs this overlap, whatever the threshold: 1 itself must stay reachable.
_FLOORS = np.tile(np.minimum(IOU_THRESHOLDS, 1 - 1e-10), len(AREA_RANGES))


@dataclass(frozen=True, slots=True)
class Matches:
    """What is left of some images after matching; parts of a data set merge to exactly the whole.

    No detection was cut yet: a box is taken by the best detection that fits it, so those that a
    protocol cuts, being worse, never change what the others matched.

    One row a counted detection: `image_id`, `column`, `score`, `rank` (its place among the image's
    detections), `overlap` (IoU with the box that it takes at the lowest threshold, else 0), and
    `true_positive` and `ignored`, (D, 5) uint8: packed bits of the 4 area ranges x 10 IoU
    thresholds. One row of `other_` a detection that takes no part, since nothing is known of its
    category in its image: it uses up places under a protocol's limit. One row a ground-truth box:
    `truth_image_id`, `truth_column`, and `truth_counts` (N, 4) bool, whether it counts in each area
    range. `image_ids` are all images seen.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    image_id: NDArray[np.int64]
    column: NDArray[np.int32]
    score: NDArray[np.float64]
    rank: NDArray[np.int32]
    overlap: NDArray[np.float64]
    true_positive: NDArray[np.uint8]
    ignored: NDArray[np.uint8]
    other_image_id: NDArray[np.int64]
    other_column: NDArray[np.int32]
    other_score: NDArray[np.float64]
    other_rank: NDArray[np.int32]
    truth_image_id: NDArray[np.int64]
    truth_column: NDArray[np.int32]
    truth_counts: NDArray[np.bool_]

    @property
    def given(self) -> int:
        """Number of all detections."""
        return len(self.rank) + len(self.other_rank)

    @property
    def most_per_image(self) -> int:
        """The largest number of detections that any image has."""
        ranks = (self.rank, self.other_rank)
        return max((int(rank.max()) + 1 for rank in ranks if len(rank)), default=0)


def match(truth: GroundTruth, detections: Detections) -> Matches:
    """Match the detections of each image to its ground truth.

    Raises `DataError` for a detection whose image or category the annotations do not have.
    """
    image = positions(truth.image_ids, detections.image_id, "image", detections.origin)
    column = positions(truth.category_ids, detections.category_id, "category", detections.origin)
    rank = _rank(image, detections.score)
    area = detections.bbox[:, 2] * detections.bbox[:, 3]
    # Boxes without area never count, on either side; they do use up places under a limit.
    real = (truth.area > 0) & np.isfinite(truth.area)
    truth_pair = truth.pair(truth.image, truth.column)
    pair = truth.pair(image, column)
    counted = (area > 0) & np.isfinite(area)
    counted &= _member(pair, np.concatenate([truth_pair[real], truth.negative]), truth)
    others = np.flatnonzero(~counted)

    rows = np.flatnonzero(counted)
    rows = rows[np.lexsort((rank[rows], pair[rows]))]
    boxes = np.flatnonzero(real)
    boxes = boxes[np.argsort(truth_pair[boxes], kind="stable")]
    ignored_truth = truth.ignored[boxes, None] | _outside(truth.area[boxes])
    matched, ignored, overlap = _match_pairs(
        (pair[rows], detections.bbox[rows]), (truth_pair[boxes], truth.bbox[boxes]), ignored_truth
    )
    excused = _outside(area[rows]) | _member(pair[rows], truth.not_exhaustive, truth)[:, None]
    ignored |= ~matched & np.repeat(excused, len(IOU_THRESHOLDS), axis=1)
    return Matches(
        image_ids=truth.image_ids,
        category_ids=truth.category_ids,
        image_id=detections.image_id[rows],
        column=column[rows].astype(np.int32),
        score=detections.score[rows],
        rank=rank[rows],
        overlap=overlap,
        true_positive=np.packbits(matched & ~ignored, axis=1),
        ignored=np.packbits(ignored, axis=1),
        other_image_id=detections.image_id[others],
        other_column=column[others].astype(np.int32),
        other_score=detections.score[others],
        other_rank=rank[others],
        truth_image_id=truth.image_ids[truth.image[boxes]],
        truth_column=truth.column[boxes].astype(np.int32),
        truth_counts=~ignored_truth,
    )


def _member(
    pair: NDArray[np.int64], members: NDArray[np.int64], truth: GroundTruth
) -> NDArray[np.bool_]:
    """Whether each pair is one of `members`, by a table of all pairs: no sorting of millions."""
    table = np.zeros(len(truth.image_ids) * truth.num_categories, bool)
    table[members] = True
    return table[pair]


def _rank(image: NDArray[np.int64], score: NDArray[np.float64]) -> NDArray[np.int32]:
    """Each detection's place in its image by score; ties keep the order of the list."""
    order = np.lexsort((-score, image))
    ordered = image[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else order
    sizes = np.diff(np.r_[first, len(order)])
    rank = np.empty(len(order), np.int32)
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
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Greedy matching in every pair, area range and threshold at once.

    In round r each pair's r-th detection that overlaps anything takes its box: one that counts
    before one that is ignored, then the largest IoU, then the last in the file. Returns (D, 40)
    bool: matched, and matched to an ignored box; and (D,) the IoU of the match at the lowest
    threshold over all areas, 0 without one.
    """
    detection, box, iou = _overlaps(found, truth)
    place = _place_in_pair(found[0], detection)
    # Within a detection the best edge comes last, so that the largest position wins.
    order = np.lexsort((box, iou, detection, place))
    detection, box, iou, place = detection[order], box[order], iou[order], place[order]

    matched = np.zeros((len(found[0]), NUM_STATES), bool)
    ignored = np.zeros_like(matched)
    overlap = np.zeros(len(found[0]))
    taken = np.zeros((len(truth[0]), NUM_STATES), bool)
    ignored_states = np.repeat(ignored_truth, len(IOU_THRESHOLDS), axis=1)
    states = np.arange(NUM_STATES)
    bounds = np.searchsorted(place, np.arange(place[-1] + 2)) if len(place) else np.zeros(1, int)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        edges, count = box[start:stop], stop - start
        free = (iou[start:stop, None] >= _FLOORS) & ~taken[edges]
        value = np.arange(count)[:, None] + np.where(ignored_states[edges], 0, count)
        first = np.flatnonzero(np.r_[True, np.diff(detection[start:stop]) > 0])
        best = np.maximum.reduceat(np.where(free, value, -1), first, axis=0)
        hit, state = np.nonzero(best >= 0)
        edge = best[hit, state] % count
        chosen = edges[edge]
        rows = detection[start:stop][first][hit]
        matched[rows, states[state]] = True
        ignored[rows, state] = ignored_states[chosen, state]
        taken[chosen, state] = True
        lowest = state == 0
        overlap[rows[lowest]] = iou[start:stop][edge[lowest]]
    return matched, ignored, overlap


def _overlaps(
    found: Boxes, truth: Boxes
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Detection row, ground-truth row and IoU of all that can match at the lowest threshold."""
    first = np.searchsorted(truth[0], found[0], side="left")
    sizes = np.searchsorted(truth[0], found[0], side="right") - first
    detection = np.repeat(np.arange(len(found[0])), sizes)
    box = np.arange(len(detection)) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)
    iou = np.empty(len(detection))
    for start in range(0, len(detection), _BLOCK):  # corners of all edges at once take much memory
        block = slice(start, start + _BLOCK)
        iou[block] = _iou(found[1][detection[block]], truth[1][box[block]])
    near = iou >= _FLOORS.min()
    return detection[near], box[near], iou[near]


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of xywh boxes row by row; the order of operations is pycocotools', equal to the last bit."""
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    size = np.maximum(high - low, 0)
    intersection = size[:, 0] * size[:, 1]
    return intersection / (a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - intersection)


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
            "image_id", "column", "score", "rank", "overlap", "true_positive", "ignored",
            "other_image_id", "other_column", "other_score", "other_rank",
            "truth_image_id", "truth_column", "truth_counts",
        )
    }  # fmt: skip
    return replace(
        first,
        image_ids=image_ids,
        **joined,
    )
