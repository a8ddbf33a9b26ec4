"""What a detector gives at a score threshold, and the precision-recall curves behind its AP."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.federated_ap import CURVE_THRESHOLDS, RECALL_THRESHOLDS
from pipeline.evaluation.matching import IOU_THRESHOLDS, Matches

Curves = dict[str, object]
"""`recall`, 101 values, and `precision` at them: group -> IoU -> 101 values or None."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Detections that are true or false at IoU 0.50, boxes of any size; those ignored are left out.

    `score` (D,), `hit` (D,) bool, `overlap` (D,) the IoU of a hit with its box; `num_truth` boxes
    were to be found.
    """

    score: NDArray[np.float64]
    hit: NDArray[np.bool_]
    overlap: NDArray[np.float64]
    num_truth: int


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Counts over all categories that are judged, at one score and one IoU threshold.

    `mean_iou` is that of the true positives with their boxes. Fractions are None where there is
    nothing to divide by.
    """

    score_threshold: float
    iou_threshold: float
    precision: float | None
    recall: float | None
    mean_iou: float | None
    detections: int
    true_positives: int

    def to_json(self) -> dict[str, float | int | None]:
        """As results.json has it."""
        return asdict(self)


def judge(matches: Matches, keep: NDArray[np.bool_]) -> Judged:
    """The detections of federated matches that a protocol keeps; see `federated_ap.kept`."""
    # The first bit is the lowest IoU threshold over all areas.
    rows = np.flatnonzero(keep & (matches.ignored[:, 0] >> 7 == 0))
    return Judged(
        score=matches.score[rows],
        hit=(matches.true_positive[rows, 0] >> 7).astype(bool),
        overlap=matches.overlap[rows],
        num_truth=int(matches.truth_counts[:, 0].sum()),
    )


def operating_point(judged: Judged, score_threshold: float | None = None) -> OperatingPoint | None:
    """Precision, recall and IoU of the detections that score at least `score_threshold`.

    Without one, the threshold whose F1 is largest (the highest of equals); None where no detection
    is judged.
    """
    if score_threshold is None:
        score_threshold = _best_threshold(judged)
    if score_threshold is None:
        return None
    chosen = judged.score >= score_threshold
    found = chosen & judged.hit
    detections, true = int(chosen.sum()), int(found.sum())
    return OperatingPoint(
        score_threshold=score_threshold,
        iou_threshold=float(IOU_THRESHOLDS[0]),
        precision=true / detections if detections else None,
        recall=true / judged.num_truth if judged.num_truth else None,
        mean_iou=float(judged.overlap[found].mean()) if true else None,
        detections=detections,
        true_positives=true,
    )


def _best_threshold(judged: Judged) -> float | None:
    if not len(judged.score):
        return None
    order = np.argsort(-judged.score, kind="stable")
    score = judged.score[order]
    # Equal scores pass a threshold together: only the last of them is a place to cut.
    last = np.flatnonzero(np.r_[np.diff(score) != 0, True])
    f1 = 2 * np.cumsum(judged.hit[order])[last] / (last + 1 + judged.num_truth)
    return float(score[last[np.argmax(f1)]])


def precision_recall(
    precision: NDArray[np.float64], groups: dict[str, NDArray[np.int64]]
) -> Curves:
    """Mean of each group of columns, out of interpolated `precision` (3, 101 recalls, C) at
    `CURVE_THRESHOLDS` over boxes of any size; NaN where it is not defined or not measured."""
    curves: dict[str, dict[str, list[float] | None]] = {}
    for group, columns in groups.items():
        part = precision[..., columns]
        part = part[..., ~np.isnan(part).all(axis=(0, 1))]
        curves[group] = {
            name: _mean_curve(curve) for name, curve in zip(CURVE_THRESHOLDS, part, strict=True)
        }
    return {"recall": RECALL_THRESHOLDS.tolist(), "precision": curves}


def _mean_curve(precision: NDArray[np.float64]) -> list[float] | None:
    measured = precision.size and not np.isnan(precision).any()
    return precision.mean(axis=1).tolist() if measured else None
