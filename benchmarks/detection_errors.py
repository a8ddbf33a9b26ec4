"""What costs a detector its AP50: false positives by kind, and what AP50 gains without each.

    python benchmarks/detection_errors.py annotations/lvis_v1_val.json RUN [RUN ...]

RUN is a run's folder (its newest evaluation is read) or a json of detections. Of detections that
count and are no true positive at an IoU of 0.5, a kind is (after Bolya et al. 2020, "TIDE"):

double      fits a box of its category that a better detection has
loose       lies on a box of its category, with an IoU of 0.1 to 0.5
category    lies on a box of another category (0.1 and more)
background  lies on nothing that is annotated

Each column is AP50 of rare, common and frequent categories: as it is, then what it gains when no
detection of the kind is counted (together more than each by itself), then what is still lacking
when none is: boxes that nothing finds.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.annotated_boxes import iou_by_row
from pipeline.evaluation.detections import Detections, load_detections
from pipeline.evaluation.federated_ap import LVIS, accumulate, kept
from pipeline.evaluation.ground_truth import GroundTruth, load_annotations, parse_ground_truth
from pipeline.evaluation.matching import Matches, match

KINDS = ("double", "loose", "category", "background")
FITS, TOUCHES = 0.5, 0.1


def boxes_of(matches: Matches, detections: Detections) -> NDArray[np.float64]:
    """(D, 4) xywh of the rows of `matches`, which are known by image and rank within it."""
    order = np.lexsort((-detections.score, detections.image_id))
    image = detections.image_id[order]
    first = np.searchsorted(image, matches.image_id)
    return detections.bbox[order[first + matches.rank]]


def kinds_of(truth: GroundTruth, matches: Matches, boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """The kind of each row of `matches`, -1 where it is right or ignored."""
    first_bit = np.uint8(128)  # all areas, an IoU of 0.5
    counts = (matches.true_positive[:, 0] | matches.ignored[:, 0]) & first_bit == 0
    order = np.argsort(truth.image, kind="stable")
    bounds = np.searchsorted(truth.image[order], np.arange(len(truth.image_ids) + 1))
    image = np.searchsorted(truth.image_ids, matches.image_id)
    kinds = np.full(len(boxes), -1, np.int64)
    for row in np.flatnonzero(counts).tolist():
        here = order[bounds[image[row]] : bounds[image[row] + 1]]
        iou = iou_by_row(boxes[[row]], truth.bbox[here])
        own = truth.column[here] == matches.column[row]
        most = iou[own].max(initial=0.0)
        if most >= TOUCHES:
            kinds[row] = 0 if most >= FITS else 1
        else:
            kinds[row] = 2 if iou.max(initial=0.0) >= TOUCHES else 3
    return kinds


def rows_of(truth: GroundTruth, detections: Detections) -> dict[str, list[float]]:
    """By frequency: AP50 in percent, its gain without each kind, and what is missed."""
    matches = match(truth, detections)
    keep = kept(matches, LVIS)
    kinds = kinds_of(truth, matches, boxes_of(matches, detections))
    without = [keep, *(keep & (kinds != kind) for kind in range(len(KINDS))), keep & (kinds < 0)]
    found = [accumulate(matches, rows) for rows in without]
    rows = {}
    for frequency in "rcf":
        columns = np.flatnonzero([each == frequency for each in truth.frequencies])
        aps = [one.ap(iou_threshold=0.5, columns=columns) for one in found]
        values = [float("nan") if ap is None else 100 * ap for ap in aps]
        gains = [value - values[0] for value in values[1:-1]]
        rows[frequency] = [values[0], *gains, 100 - values[-1]]
    return rows


def find_detections(run: Path) -> Path:
    """The json itself, or that of a run's newest evaluation."""
    if run.is_file():
        return run
    # An evaluation of some of the images has a name that goes on after the number.
    found = sorted(run.glob("evaluations/step_*[0-9]/detections.json"))
    if not found:
        raise SystemExit(f"{run}: no detections.json of all images; run longtail evaluate")
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    truth = parse_ground_truth(load_annotations(options.annotations))
    print(f"{'':32}{'AP50':>12}" + "".join(f"{kind:>12}" for kind in (*KINDS, "missed")))
    for run in options.runs:
        for frequency, values in rows_of(truth, load_detections(find_detections(run))).items():
            name = f"{run if run.is_file() else run.name}, {frequency}"
            gains = "".join(f"{value:+12.1f}" for value in values[1:-1])
            print(f"{name:32}{values[0]:12.1f}{gains}{values[-1]:12.1f}")


if __name__ == "__main__":
    main()
