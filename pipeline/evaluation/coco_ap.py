"""COCO box AP by pycocotools: its only import, which neither prints nor writes to what it is given.

One category at a time and only its images: the figures are the same, and the cost follows the boxes
and not images x categories, which for Objects365 is 29 million.
"""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from pipeline.evaluation.annotated_boxes import AnnotatedBoxes, FoundBoxes, iou_by_row
from pipeline.evaluation.federated_ap import mean_defined
from pipeline.evaluation.operating import Judged

_PARAMETERS = Params(iouType="bbox")
IOU_THRESHOLDS: list[float] = _PARAMETERS.iouThrs.tolist()
AREAS: list[str] = _PARAMETERS.areaRngLbl
"""all, small (to 32^2 square pixels), medium, large (from 96^2)."""
LIMITS: list[int] = _PARAMETERS.maxDets
"""Of each image and category the best 1, 10 and 100 detections count; AP is that of the last."""


@dataclass(frozen=True, slots=True)
class COCOFigures:
    """`precision` (10 IoU thresholds, 101 recalls, C, 4 areas) at the largest limit and `recall`
    (10, C, 4, 3 limits); NaN where a category has no box that counts in the area range. `judged`
    are the detections, within the largest limit, of categories that have such a box."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    judged: Judged

    def ap(
        self, area: str = "all", iou_threshold: float | None = None, column: int | None = None
    ) -> float | None:
        """Mean precision over the categories that are defined, or None where none is."""
        part = self.precision[..., AREAS.index(area)]
        if iou_threshold is not None:
            part = part[IOU_THRESHOLDS.index(iou_threshold)]
        return mean_defined(part if column is None else part[..., column])

    def ar(
        self, area: str = "all", limit: int = LIMITS[-1], column: int | None = None
    ) -> float | None:
        """Mean of the largest recall over IoU thresholds and categories, or None."""
        part = self.recall[..., AREAS.index(area), LIMITS.index(limit)]
        return mean_defined(part if column is None else part[:, column])


def coco_figures(truth: AnnotatedBoxes, found: FoundBoxes) -> COCOFigures:
    """Match as pycocotools does; `truth.ignored` are crowd regions.

    A detection that matches a crowd region, by the share of itself that lies inside, is ignored,
    and any number of them may; a crowd region that nothing finds is not missed.
    """
    size = truth.num_categories
    shape = (len(IOU_THRESHOLDS), len(_PARAMETERS.recThrs), size, len(AREAS))
    precision = np.full(shape, np.nan)
    recall = np.full((len(IOU_THRESHOLDS), size, len(AREAS), len(LIMITS)), np.nan)
    truth_rows, found_rows = _by_column(truth.column, size), _by_column(found.column, size)
    matches = np.zeros((2, 0), np.int64)
    for column in np.unique(truth.column[~truth.ignored]).tolist():
        evaluation = _one_category(truth, truth_rows[column], found, found_rows[column])
        precision[:, :, column] = evaluation.eval["precision"][:, :, 0, :, -1]
        recall[:, column] = evaluation.eval["recall"][:, 0]
        rows, boxes = _matches(evaluation)
        boxes = np.where(boxes < 0, -1, truth_rows[column][boxes])
        matches = np.hstack([matches, [found_rows[column][rows], boxes]])
    # pycocotools says -1 for undefined.
    precision, recall = (np.where(array == -1, np.nan, array) for array in (precision, recall))
    return COCOFigures(precision, recall, _judge(truth, found, *matches))


def _judge(
    truth: AnnotatedBoxes, found: FoundBoxes, rows: NDArray[np.int64], boxes: NDArray[np.int64]
) -> Judged:
    """Detections by their rows with the row of the box that each takes, -1 for none."""
    hit = boxes >= 0
    overlap = np.zeros(len(rows))
    overlap[hit] = iou_by_row(found.bbox[rows[hit]], truth.bbox[boxes[hit]])
    return Judged(found.score[rows], hit, overlap, int((~truth.ignored).sum()))


def _by_column(column: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Rows of each column, in their order."""
    order = np.argsort(column, kind="stable")
    return np.split(order, np.searchsorted(column[order], np.arange(1, size)))


def _one_category(
    truth: AnnotatedBoxes,
    truth_rows: NDArray[np.int64],
    found: FoundBoxes,
    found_rows: NDArray[np.int64],
) -> COCOeval:
    boxes = _rows(truth.image[truth_rows], truth.bbox[truth_rows])
    for row, area, crowd in zip(
        boxes, truth.area[truth_rows].tolist(), truth.ignored[truth_rows].tolist(), strict=True
    ):
        row.update(area=area, iscrowd=int(crowd))
    detections = _rows(found.image[found_rows], found.bbox[found_rows])
    for row, score in zip(detections, found.score[found_rows].tolist(), strict=True):
        row.update(score=score, area=row["bbox"][2] * row["bbox"][3], iscrowd=0)
    images = np.union1d(truth.image[truth_rows], found.image[found_rows]).tolist()
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(images, boxes), _index(images, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _matches(evaluation: COCOeval) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the detections that are not ignored at IoU 0.50 over all areas, and of the box
    that each takes, -1 for none."""
    # Images follow each other within an area range, and the first range is all areas.
    images = evaluation.evalImgs[: len(evaluation.params.imgIds)]
    ids, box_ids, ignored = (
        np.concatenate(arrays).astype(np.int64)
        for arrays in zip(
            *((one["dtIds"], one["dtMatches"][0], one["dtIgnore"][0]) for one in images),
            strict=True,
        )
    )
    judged = ignored == 0
    return ids[judged] - 1, box_ids[judged] - 1


def _rows(image: NDArray[np.int64], bbox: NDArray[np.float64]) -> list[dict[str, Any]]:
    # Ids start at 1, whatever the file's: pycocotools takes a match to id 0 for no match.
    return [
        {"id": position + 1, "image_id": image_id, "category_id": 1, "bbox": box}
        for position, (image_id, box) in enumerate(zip(image.tolist(), bbox.tolist(), strict=True))
    ]


def _index(images: list[int], rows: list[dict[str, Any]]) -> COCO:
    index = COCO()
    index.dataset = {
        "images": [{"id": image_id} for image_id in images],
        "categories": [{"id": 1}],
        "annotations": rows,
    }
    index.createIndex()
    return index
