"""Which rare objects a detector finds."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan.draws import permutation
from pipeline.evaluation.annotated_boxes import iou_by_row
from pipeline.evaluation.detections import Detections

LEAST_IOU = 0.5


@dataclass(frozen=True)
class RareObjects:
    """Ground-truth boxes of rare categories, one row each, and what finds them.

    `image_id`, `category_id` (N,) int64, `bbox` (N, 4) xywh in pixels of the photograph; `finder`
    (N, 2) int64 is the row of the detection that finds it, of the first and of the second detector,
    and -1 where none does.
    """

    image_id: NDArray[np.int64]
    category_id: NDArray[np.int64]
    bbox: NDArray[np.float64]
    finder: NDArray[np.int64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """(N, 2) by which of the two detectors."""
        found: NDArray[np.bool_] = self.finder >= 0
        return found

    def outcomes(self) -> dict[str, int]:
        """How many are found by both, only by the first, only by the second, by neither."""
        first, second = self.found.T
        cases = {
            "both": first & second,
            "only_a": first & ~second,
            "only_b": second & ~first,
            "neither": ~first & ~second,
        }
        return {name: int(rows.sum()) for name, rows in cases.items()}

    @property
    def decided(self) -> NDArray[np.bool_]:
        """(N,) which of them exactly one detector finds."""
        decided: NDArray[np.bool_] = self.found[:, 0] != self.found[:, 1]
        return decided

    def choose_images(self, number: int, seed: int) -> list[int]:
        """Up to `number` image ids, drawn by the seed from all that have a decided object."""
        images = np.unique(self.image_id[self.decided])
        chosen: list[int] = images[permutation(len(images), seed, "images")[:number]].tolist()
        return chosen


def find(
    image_id: NDArray[np.int64],
    category_id: NDArray[np.int64],
    bbox: NDArray[np.float64],
    detections: Detections,
) -> NDArray[np.int64]:
    """The row of the detection that finds each object, (N,), or -1; `bbox` is (N, 4) xywh.

    A detection of the object's category on its image finds it with an IoU of 0.5 and more. Each
    detection, from the highest score down, takes the object that it overlaps most of those not
    taken; so two objects need two detections (COCO's matching).
    """
    finder = np.full(len(image_id), -1, np.int64)
    pairs = dict.fromkeys(zip(image_id.tolist(), category_id.tolist(), strict=True))
    for image, category in pairs:
        objects = np.flatnonzero((image_id == image) & (category_id == category))
        rows = np.flatnonzero((detections.image_id == image) & (detections.category_id == category))
        for row in rows[np.argsort(-detections.score[rows], kind="stable")].tolist():
            free = objects[finder[objects] < 0]
            if not len(free):
                break
            box = np.broadcast_to(detections.bbox[row], (len(free), 4))
            overlaps = iou_by_row(box, bbox[free])
            if overlaps.max() >= LEAST_IOU:
                finder[free[overlaps.argmax()]] = row
    return finder
