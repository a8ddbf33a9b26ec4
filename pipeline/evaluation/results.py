"""From detections to the figures that a run is judged by, on disk and as a table."""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import DataError
from pipeline.evaluation.detections import Detections
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
from pipeline.evaluation.operating import operating_point, precision_recall

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
) -> Results:
    """LVIS box AP of `detections`, overall and by category.

    `vocabulary` is the detector's; its categories must mean the same as the annotations'.
    `train_image_counts` (category id -> training images) go into the per-category rows; without
    them, the counts that the annotations state. Only the images that the detector saw are
    evaluated (`detections.images`). `protocol` is that of the figures on the top level; those of
    all of `PROTOCOLS` are under "protocols". `score_threshold` is that of the operating point.
    Raises `DataError` for files that cannot be evaluated.
    """
    truth = read_ground_truth(ground_truth)
    if vocabulary is not None:
        check_vocabulary(truth, vocabulary)
    num_annotated = len(truth.image_ids)
    if detections.images is not None:
        truth = truth.subset(detections.images)
    matches = match(truth, detections)
    return summarize(truth, matches, num_annotated, train_image_counts, protocol, score_threshold)


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
        same = other == protocol or np.array_equal(kept(matches, other), keep)
        other_figures = figures if same else accumulate(matches, kept(matches, other))
        labelled[other.name] = {
            "protocol": _sentence(other, matches, num_annotated),
            **_summary(other_figures, truth, other),
        }
    groups = {"all": np.arange(truth.num_categories), **_columns_by_frequency(truth)}
    point = operating_point(matches, keep, score_threshold)
    return {
        "protocol": _sentence(protocol, matches, num_annotated),
        **_summary(figures, truth, protocol),
        "protocols": labelled,
        "operating_point": None if point is None else point.to_json(),
        "counts": _counts(truth, matches, keep, protocol, num_annotated),
        "curves": precision_recall(figures, groups),
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


def evaluation_dir(run_dir: Path, step: int) -> Path:
    """Where the evaluation of one step lives."""
    return Path(run_dir) / "evaluations" / f"step_{step:08d}"


def write_results(run_dir: Path, step: int, results: Results, detections: Detections) -> Path:
    """Publish an evaluation and make it the run's last one; returns its directory.

    Writes detections.json, per_category.csv, curves.json and last results.json, each complete or
    not at all.
    """
    folder = evaluation_dir(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    detections.save(folder / "detections.json")
    rows = results["per_category"]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]) if rows else ["category_id"])
    writer.writeheader()
    writer.writerows(rows)
    _publish(folder / "per_category.csv", table.getvalue())
    if results["curves"] is not None:
        _publish(folder / "curves.json", json.dumps(results["curves"], allow_nan=False) + "\n")
    text = _to_json(results | {"step": step})
    _publish(folder / "results.json", text)
    _publish(Path(run_dir) / "results.json", text)
    return folder


def save_results(path: Path, results: Results) -> None:
    """Write everything that was measured as json, complete or not at all."""
    _publish(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def _to_json(results: Results) -> str:
    apart = ("per_category", "curves")
    figures = {key: value for key, value in results.items() if key not in apart}
    return json.dumps(figures, indent=2, allow_nan=False) + "\n"


def _publish(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def format_table(results: Results) -> str:
    """The protocol line, the nine figures in aligned columns, and what they were counted on.

    Other protocols follow where their figures are others: they have rows of their own, named.
    """
    counts = results["counts"]
    groups = counts["categories_with_ground_truth"]
    frequencies = ""
    if any(groups[frequency] for frequency in "rcf"):
        frequencies = f" ({groups['r']:,} rare, {groups['c']:,} common, {groups['f']:,} frequent)"
    lines = [
        results["protocol"],
        "".join(f"{key:>8}" for key in AP_KEYS),
        _row(results),
        f"{counts['instances']:,} boxes of {groups['all']:,} categories{frequencies}; "
        f"{counts['detections']:,} detections, {counts['detections_over_limit']:,} beyond the "
        f"limit, {counts['detections_counted']:,} in categories that count",
    ]
    for other in (results.get("protocols") or {}).values():
        if _row(other) != _row(results):
            lines += [other["protocol"], _row(other)]
    point = results.get("operating_point")
    if point is not None:
        precision, recall, iou = (
            format_fraction(point[key]) for key in ("precision", "recall", "mean_iou")
        )
        lines.append(
            f"at score {point['score_threshold']:.3f} and IoU {point['iou_threshold']:.2f}: "
            f"precision {precision}, recall {recall}, mean IoU of the true positives {iou}"
        )
    return "\n".join(lines)


def _row(figures: Mapping[str, Any]) -> str:
    return "".join(f"{format_fraction(figures[key]):>8}" for key in AP_KEYS)


def format_fraction(value: float | None) -> str:
    """Four decimals, or a dash where the figure is undefined."""
    return "-" if value is None else f"{value:.4f}"


def format_comparison(results: Results, official: Mapping[str, float | None]) -> str:
    """Our figures beside the official package's, with their differences."""
    lines = [f"{'':>8}{'ours':>10}{'official':>10}{'difference':>12}"]
    for key in (key for key in official if key in results):
        ours, theirs = results[key], official[key]
        difference = "-" if ours is None or theirs is None else f"{ours - theirs:.1e}"
        figures = f"{format_fraction(ours):>10}{format_fraction(theirs):>10}"
        lines.append(f"{key:>8}{figures}{difference:>12}")
    return "\n".join(lines)
