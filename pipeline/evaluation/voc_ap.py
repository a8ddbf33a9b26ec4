"""Pascal VOC box AP by the rules of the development kit (Everingham et al. 2010, section 4.2).

A box x, y, w, h covers the pixels x + 1 to x + w of a photograph whose first pixel is 1, as VOC
counts them: xmin = x + 1 and xmax = x + w, both inside the box. The kit's overlap adds 1 to each
difference of such coordinates, which is then exactly intersection over union of the x, y, w, h.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.annotated_boxes import AnnotatedBoxes, FoundBoxes, iou_by_row
from pipeline.evaluation.federated_ap import RECALL_THRESHOLDS
from pipeline.evaluation.operating import Judged

Year = Literal[2007, 2010]
"""2007: mean precision at 11 recalls. 2010 and later: area under the whole curve."""

MIN_OVERLAP = 0.5
# MATLAB makes 0:0.1:1, the kit's recalls, from both ends. Its fourth value is one rounding error
# above 0.3, so that a recall of exactly 3/10 does not reach it.
_RECALLS = np.concatenate([np.arange(6) * 0.1, 1 - np.arange(4, -1, -1) * 0.1])


@dataclass(frozen=True, slots=True)
class VOCFigures:
    """`average` (C,), the AP of each category, and `curves` (101 recalls, C), its interpolated
    precision; NaN without a box that counts. `judged` are the detections of the others."""

    average: NDArray[np.float64]
    curves: NDArray[np.float64]
    judged: Judged


def voc_figures(truth: AnnotatedBoxes, found: FoundBoxes, year: Year) -> VOCFigures:
    """Match by the kit's rules; `truth.ignored` are difficult.

    Every detection counts, equal scores in the order of their list. Where all detections of a
    category lie on difficult boxes AP is 0; the kit divides zero by zero there.
    """
    overlap, judged = _assign(truth, found)
    hit = overlap > 0
    size = truth.num_categories
    num_truth = np.bincount(truth.column[~truth.ignored], minlength=size)
    order = np.lexsort((-found.score, found.column))
    order = order[judged[order] & (num_truth[found.column[order]] > 0)]
    bounds = np.searchsorted(found.column[order], np.arange(size + 1))
    average = np.full(size, np.nan)
    curves = np.full((len(RECALL_THRESHOLDS), size), np.nan)
    for column in np.flatnonzero(num_truth).tolist():
        hits = hit[order[bounds[column] : bounds[column + 1]]]
        average[column], curves[:, column] = _one_category(hits, int(num_truth[column]), year)
    counted = Judged(found.score[order], hit[order], overlap[order], int(num_truth.sum()))
    return VOCFigures(average, curves, counted)


def _one_category(
    hits: NDArray[np.bool_], num_truth: int, year: Year
) -> tuple[float, NDArray[np.float64]]:
    """AP and curve (101,) of one category out of its judged detections (D,), best first."""
    true = np.cumsum(hits)
    recall = true / num_truth
    precision = true / np.arange(1, len(hits) + 1)
    # The largest precision at this recall or a larger one; none beyond the last.
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    curve = envelope[np.searchsorted(recall, RECALL_THRESHOLDS, side="left")]
    if year == 2007:
        average = envelope[np.searchsorted(recall, _RECALLS, side="left")].mean()
    else:
        average = (np.diff(recall, prepend=0.0) * envelope[:-1]).sum()
    return float(average), curve


def _assign(
    truth: AnnotatedBoxes, found: FoundBoxes
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """For each detection, its IoU as a true positive, else 0, and whether it is judged, (D,).

    It belongs to the box of its image and category that it overlaps most (of equals the first in
    the file), taken or not. A difficult box excuses all that belong to it; of any other box the
    detection with the best score is the true positive.
    """
    detection, box, iou = _best_boxes(truth, found)
    judged = np.ones(len(found.score), bool)
    difficult = truth.ignored[box]
    judged[detection[difficult]] = False
    detection, box, iou = detection[~difficult], box[~difficult], iou[~difficult]
    order = np.argsort(-found.score[detection], kind="stable")
    _, first = np.unique(box[order], return_index=True)
    overlap = np.zeros(len(found.score))
    overlap[detection[order[first]]] = iou[order[first]]
    return overlap, judged


def _best_boxes(
    truth: AnnotatedBoxes, found: FoundBoxes
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Detections (ascending) that overlap some box enough, the box that each overlaps most, and
    their IoU."""
    truth_pair = truth.image * truth.num_categories + truth.column
    pair = found.image * truth.num_categories + found.column
    in_pair = np.argsort(truth_pair, kind="stable")
    first = np.searchsorted(truth_pair[in_pair], pair, side="left")
    sizes = np.searchsorted(truth_pair[in_pair], pair, side="right") - first
    detection = np.repeat(np.arange(len(pair)), sizes)
    place = np.arange(len(detection)) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)
    box = in_pair[place]
    overlap = iou_by_row(found.bbox[detection], truth.bbox[box])
    near = overlap >= MIN_OVERLAP
    detection, box, overlap = detection[near], box[near], overlap[near]
    # Boxes of a detection are in the file's order, and sorting is stable.
    order = np.lexsort((-overlap, detection))
    best, first = np.unique(detection[order], return_index=True)
    return best, box[order[first]], overlap[order[first]]
