"""From detections to the figures that a run is judged by, and these on disk."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.storage.files import publish_bytes
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import DataError
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.entries import positions
from pipeline.evaluation.federated_ap import (
    FIXED,
    LVIS,
    LVIS_1000,
    FederatedAP,
    Protocol,
    accumulate,
    kept,
    over_limit,
)
from pipeline.evaluation.ground_truth import (
    Annotations,
    GroundTruth,
    load_annotations,
    parse_ground_truth,
)
from pipeline.evaluation.matching import Matches, match
from pipeline.evaluation.operating import judge, operating_point, precision_recall

PROTOCOLS = (LVIS, LVIS_1000, FIXED)
"""All that are counted in one pass; the first is the LVIS challenge's and the default."""
AP_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")

Results = dict[str, Any]
"""`AP_KEYS` and AR keys (fractions, None where undefined), protocol, protocols, operating_point,
counts; curves and per_category, which have files of their own."""


def evaluate_detections(
    ground_truth: GroundTruth | Annotations | str | Path,
    detections: Detections,
    vocabulary: Vocabulary | None = None,
    train_image_counts: Mapping[int, int] | None = None,
    protocol: Protocol = LVIS,
    score_threshold: float | None = None,
    images: NDArray[np.int64] | None = None,
) -> Results:
    """LVIS box AP of `detections`, overall and by category.

    `vocabulary` is the detector's; its categories must mean the same as the annotations'.
    `train_image_counts` (category id -> training images) go into the per-category rows; without
    them, the counts that the annotations state. Only the images that the detector saw are
    evaluated (`detections.images`), and of these only `images` where given; counts say how many
    detections lie elsewhere. `protocol` is that of the figures on the top level; those of
    all of `PROTOCOLS` are under "protocols". `score_threshold` is that of the operating point.
    Raises `DataError` for files that cannot be evaluated.
    """
    truth = read_ground_truth(ground_truth)
    if vocabulary is not None:
        check_vocabulary(truth, vocabulary)
    num_annotated, num_given = len(truth.image_ids), len(detections)
    if images is not None:
        positions(truth.image_ids, detections.image_id, "image", detections.origin)
        detections = detections.on_images(images)
    if detections.images is not None:
        truth = truth.subset(detections.images)
    matches = match(truth, detections)
    results = summarize(
        truth, matches, num_annotated, train_image_counts, protocol, score_threshold
    )
    results["counts"]["detections"] = num_given
    results["counts"]["detections_elsewhere"] = num_given - matches.given
    return results


def summarize(
    truth: GroundTruth,
    matches: Matches,
    num_annotated: int,
    train_image_counts: Mapping[int, int] | None = None,
    protocol: Protocol = LVIS,
    score_threshold: float | None = None,
) -> Results:
    """The figures of (merged) matches on `truth`, which has `num_annotated` images in the file."""
    keep = kept(matches, protocol)
    figures = accumulate(matches, keep)
    labelled = {}
    for other in PROTOCOLS:
        other_keep = keep if other == protocol else kept(matches, other)
        same = np.array_equal(other_keep, keep)
        other_figures = figures if same else accumulate(matches, other_keep)
        labelled[other.name] = {
            "protocol": _sentence(other, matches, num_annotated),
            **_summary(other_figures, truth, other),
        }
    groups = {"all": np.arange(truth.num_categories), **_columns_by_frequency(truth)}
    point = operating_point(judge(matches, keep), score_threshold)
    return {
        "protocol": _sentence(protocol, matches, num_annotated),
        **_summary(figures, truth, protocol),
        "protocols": labelled,
        "operating_point": None if point is None else point.to_json(),
        "counts": _counts(truth, matches, keep, protocol, num_annotated),
        "curves": precision_recall(figures.curves, groups),
        "per_category": _per_category(figures, truth, matches, keep, train_image_counts),
    }


def _sentence(protocol: Protocol, matches: Matches, num_annotated: int) -> str:
    """What was measured, so that figures of different protocols are never taken for each other."""
    images = f"{len(matches.image_ids):,}"
    if len(matches.image_ids) < num_annotated:
        images += f" of {num_annotated:,}"
    limit = str(protocol)
    most = matches.most_per_image
    if protocol.per_image is None or most < protocol.per_image:
        limit += f" (at most {most:,} per image were given)"
    return f"LVIS box AP, federated, IoU 0.50:0.95, {limit}, {images} images"


def read_ground_truth(ground_truth: GroundTruth | Annotations | str | Path) -> GroundTruth:
    """Checked annotations, out of whatever form they are in."""
    if isinstance(ground_truth, GroundTruth):
        return ground_truth
    if isinstance(ground_truth, str | Path):
        return parse_ground_truth(load_annotations(ground_truth), str(ground_truth))
    return parse_ground_truth(ground_truth)


def check_vocabulary(truth: GroundTruth, vocabulary: Vocabulary) -> None:
    """Raise `DataError` where an id means one category to the detector and another to the file."""
    names = dict(zip(truth.category_ids.tolist(), truth.names, strict=True))
    for category in vocabulary.categories:
        if names.get(category.id, category.name) != category.name:
            raise DataError(
                f"category {category.id} is {category.name!r} to the detector and "
                f"{names[category.id]!r} to the annotations; evaluate on annotations of the "
                "vocabulary that the detector was trained with"
            )


def _summary(
    figures: FederatedAP, truth: GroundTruth, protocol: Protocol
) -> dict[str, float | None]:
    summary = {
        "AP": figures.ap(),
        "AP50": figures.ap(iou_threshold=0.5),
        "AP75": figures.ap(iou_threshold=0.75),
    }
    areas = ("small", "medium", "large")
    summary |= {f"AP{area[0]}": figures.ap(area) for area in areas}
    for frequency, columns in _columns_by_frequency(truth).items():
        summary[f"AP{frequency}"] = figures.ap(columns=columns)
    summary[f"AR@{protocol.name}"] = figures.ar()
    return summary | {f"AR{area[0]}@{protocol.name}": figures.ar(area) for area in areas}


def _columns_by_frequency(truth: GroundTruth) -> dict[str, NDArray[np.int64]]:
    return {
        frequency: np.flatnonzero([value == frequency for value in truth.frequencies])
        for frequency in "rcf"
    }


def _counts(
    truth: GroundTruth,
    matches: Matches,
    keep: NDArray[np.bool_],
    protocol: Protocol,
    num_annotated: int,
) -> dict[str, Any]:
    present = np.unique(matches.truth_column).tolist()
    groups = [truth.frequencies[column] for column in present]
    return {
        "images": len(truth.image_ids),
        "images_annotated": num_annotated,
        "instances": len(matches.truth_column),
        "categories": truth.num_categories,
        "categories_with_ground_truth": {
            "all": len(present),
            **{frequency: groups.count(frequency) for frequency in "rcf"},
        },
        "detections": matches.given,
        "detections_elsewhere": 0,
        "detections_over_limit": over_limit(matches, protocol),
        "detections_counted": int(keep.sum()),
    }


def _per_category(
    figures: FederatedAP,
    truth: GroundTruth,
    matches: Matches,
    keep: NDArray[np.bool_],
    train_image_counts: Mapping[int, int] | None,
) -> list[dict[str, Any]]:
    size = truth.num_categories
    pairs = np.unique(np.stack([matches.truth_column, matches.truth_image_id]), axis=1)
    images = np.bincount(pairs[0], minlength=size).tolist()
    instances = np.bincount(matches.truth_column, minlength=size).tolist()
    counted = np.bincount(matches.column[keep], minlength=size).tolist()
    rows = []
    for column, category_id in enumerate(truth.category_ids.tolist()):
        stated = int(truth.image_counts[column])
        train_images = stated if stated >= 0 else None
        if train_image_counts is not None:
            train_images = train_image_counts.get(category_id, 0)
        one = np.array([column])
        rows.append(
            {
                "category_id": category_id,
                "name": truth.names[column],
                "frequency": truth.frequencies[column],
                "train_images": train_images,
                "images": images[column],
                "instances": instances[column],
                "detections": counted[column],
                "AP": figures.ap(columns=one),
                "AP50": figures.ap(iou_threshold=0.5, columns=one),
                "AP75": figures.ap(iou_threshold=0.75, columns=one),
                "AR": figures.ar(columns=one),
            }
        )
    return rows


def evaluation_dir(run_dir: Path, step: int, *, subset: bool = False) -> Path:
    """Where the evaluation of one step lives; one on a subset of the images has its own place."""
    return Path(run_dir) / "evaluations" / f"step_{step:08d}{'_subset' if subset else ''}"


def write_results(
    run_dir: Path, step: int, results: Results, detections: Detections, *, subset: bool = False
) -> Path:
    """Publish an evaluation; returns its directory. On all images it becomes the run's last one.

    Writes detections.json, per_category.csv, curves.json and last results.json, each complete or
    not at all.
    """
    folder = evaluation_dir(run_dir, step, subset=subset)
    folder.mkdir(parents=True, exist_ok=True)
    detections.save(folder / "detections.json")
    rows = results["per_category"]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]) if rows else ["category_id"])
    writer.writeheader()
    writer.writerows(rows)
    publish_bytes(str(folder / "per_category.csv"), table.getvalue().encode())
    curves = json.dumps(results["curves"], allow_nan=False) + "\n"
    publish_bytes(str(folder / "curves.json"), curves.encode())
    text = _to_json(results | {"step": step})
    publish_bytes(str(folder / "results.json"), text)
    if not subset:
        publish_bytes(str(Path(run_dir) / "results.json"), text)
    return folder


def save_results(path: Path, results: Results) -> None:
    """Write everything that was measured as json, complete or not at all."""
    publish_bytes(str(path), (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


def _to_json(results: Results) -> bytes:
    apart = ("per_category", "curves")
    figures = {key: value for key, value in results.items() if key not in apart}
    return (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode()
