"""Pascal VOC box AP by the rules of the development kit (Everingham et al. 2010, section 4.2).

A box x, y, w, h covers the pixels x + 1 to x + w of a photograph whose first pixel is 1, as VOC
counts them: xmin = x + 1 and xmax = x + w, both inside the box. The kit's overlap adds 1 to each
difference of such coordinates, which is then exactly intersection over union of the x, y, w, h.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.annotated_boxes import AnnotatedBoxes, FoundBoxes

Year = Literal[2007, 2010]
"""2007: mean precision at 11 recalls. 2010 and later: area under the whole curve."""

MIN_OVERLAP = 0.5
# MATLAB makes 0:0.1:1, the kit's recalls, from both ends. Its fourth value is one rounding error
# above 0.3, so that a recall of exactly 3/10 does not reach it.
_RECALLS = np.concatenate([np.arange(6) * 0.1, 1 - np.arange(4, -1, -1) * 0.1])


def voc_average_precision(
    truth: AnnotatedBoxes, found: FoundBoxes, year: Year
) -> NDArray[np.float64]:
    """AP of each category, (C,); NaN without a box that counts. `truth.ignored` are difficult.

    Every detection counts, equal scores in the order of their list. Where all detections of a
    category lie on difficult boxes AP is 0; the kit divides zero by zero there.
    """
    hit, judged = _assign(truth, found)
    size = truth.num_categories
    num_truth = np.bincount(truth.column[~truth.ignored], minlength=size)
    order = np.lexsort((-found.score, found.column))
    order = order[judged[order]]
    bounds = np.searchsorted(found.column[order], np.arange(size + 1))
    average = np.full(size, np.nan)
    for column in np.flatnonzero(num_truth).tolist():
        hits = hit[order[bounds[column] : bounds[column + 1]]]
        average[column] = _average_precision(hits, int(num_truth[column]), year)
    return average


def _average_precision(hits: NDArray[np.bool_], num_truth: int, year: Year) -> float:
    """AP of one category out of its judged detections (D,), best first."""
    true = np.cumsum(hits)
    recall = true / num_truth
    precision = true / np.arange(1, len(hits) + 1)
    # The largest precision at this recall or a larger one; none beyond the last.
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if year == 2007:
        return float(envelope[np.searchsorted(recall, _RECALLS, side="left")].mean())
    return float((np.diff(recall, prepend=0.0) * envelope[:-1]).sum())


def _assign(
    truth: AnnotatedBoxes, found: FoundBoxes
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each detection, whether it is a true positive and whether it is judged at all, (D,).

    It belongs to the box of its image and category that it overlaps most (of equals the first in
    the file), taken or not. A difficult box excuses all that belong to it; of any other box the
    detection with the best score is the true positive.
    """
    detection, box = _best_boxes(truth, found)
    judged = np.ones(len(found.score), bool)
    difficult = truth.ignored[box]
    judged[detection[difficult]] = False
    detection, box = detection[~difficult], box[~difficult]
    order = np.argsort(-found.score[detection], kind="stable")
    _, first = np.unique(box[order], return_index=True)
    hit = np.zeros(len(found.score), bool)
    hit[detection[order[first]]] = True
    return hit, judged


def _best_boxes(
    truth: AnnotatedBoxes, found: FoundBoxes
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Detections (ascending) that overlap some box enough, and the box that each overlaps most."""
    truth_pair = truth.image * truth.num_categories + truth.column
    pair = found.image * truth.num_categories + found.column
    in_pair = np.argsort(truth_pair, kind="stable")
    first = np.searchsorted(truth_pair[in_pair], pair, side="left")
    sizes = np.searchsorted(truth_pair[in_pair], pair, side="right") - first
    detection = np.repeat(np.arange(len(pair)), sizes)
    place = np.arange(len(detection)) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)
    box = in_pair[place]
    overlap = _overlap(found.bbox[detection], truth.bbox[box])
    near = overlap >= MIN_OVERLAP
    detection, box, overlap = detection[near], box[near], overlap[near]
    # Boxes of a detection are in the file's order, and sorting is stable.
    order = np.lexsort((-overlap, detection))
    best, first = np.unique(detection[order], return_index=True)
    return best, box[order[first]]


def _overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of xywh boxes row by row, (N,)."""
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    intersection = np.maximum(high - low, 0).prod(axis=1)
    union = a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - intersection
    # Only two boxes without area have no union; they do not overlap.
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
