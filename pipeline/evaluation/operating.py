"""What a detector gives at a score threshold, and the precision-recall curves behind its AP."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.federated_ap import RECALL_THRESHOLDS, FederatedAP
from pipeline.evaluation.matching import IOU_THRESHOLDS, Matches

CURVE_THRESHOLDS = {"0.50": 0.5, "0.75": 0.75, "0.50:0.95": None}

Curves = dict[str, object]
"""`recall`, 101 values, and `precision` at them: group -> IoU -> 101 values or None."""


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


def operating_point(
    matches: Matches, keep: NDArray[np.bool_], score_threshold: float | None = None
) -> OperatingPoint | None:
    """Precision, recall and IoU of the detections that score at least `score_threshold`.

    Without one, the threshold whose F1 is largest (the highest of equals); None where no detection
    is judged. IoU 0.50, boxes of any size; detections that the protocol ignores do not count.
    """
    # The first bit is the lowest IoU threshold over all areas.
    hit = (matches.true_positive[:, 0] >> 7).astype(bool)
    judged = keep & ~(matches.ignored[:, 0] >> 7).astype(bool)
    num_truth = int(matches.truth_counts[:, 0].sum())
    if score_threshold is None:
        score_threshold = _best_threshold(matches.score[judged], hit[judged], num_truth)
    if score_threshold is None:
        return None
    chosen = judged & (matches.score >= score_threshold)
    detections, true = int(chosen.sum()), int((chosen & hit).sum())
    return OperatingPoint(
        score_threshold=score_threshold,
        iou_threshold=float(IOU_THRESHOLDS[0]),
        precision=true / detections if detections else None,
        recall=true / num_truth if num_truth else None,
        mean_iou=float(matches.overlap[chosen & hit].mean()) if true else None,
        detections=detections,
        true_positives=true,
    )


def _best_threshold(
    score: NDArray[np.float64], hit: NDArray[np.bool_], num_truth: int
) -> float | None:
    if not len(score):
        return None
    order = np.argsort(-score, kind="stable")
    # Equal scores pass a threshold together: only the last of them is a place to cut.
    last = np.flatnonzero(np.r_[np.diff(score[order]) != 0, True])
    f1 = 2 * np.cumsum(hit[order])[last] / (last + 1 + num_truth)
    return float(score[order][last[np.argmax(f1)]])


def precision_recall(figures: FederatedAP, groups: dict[str, NDArray[np.int64]]) -> Curves:
    """Mean interpolated precision at 101 recalls of each group of columns, boxes of any size."""
    curves: dict[str, dict[str, list[float] | None]] = {}
    for group, columns in groups.items():
        part = figures.curves[..., columns]
        part = part[..., ~np.isnan(part).all(axis=(0, 1))]
        curves[group] = {
            name: None
            if not part.shape[-1]
            else part[slice(None) if iou is None else IOU_THRESHOLDS == iou].mean((0, 2)).tolist()
            for name, iou in CURVE_THRESHOLDS.items()
        }
    return {"recall": RECALL_THRESHOLDS.tolist(), "precision": curves}
