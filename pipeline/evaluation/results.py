"""From detections to the figures that a run is judged by, on disk and as a table."""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import DataError
from pipeline.evaluation.detections import Detections, load_detections
from pipeline.evaluation.federated_ap import (
    MAX_DETECTIONS,
    FederatedAP,
    Matches,
    accumulate,
    match,
)
from pipeline.evaluation.ground_truth import (
    Annotations,
    GroundTruth,
    load_annotations,
    parse_ground_truth,
)
from pipeline.evaluation.official import official_lvis

AP_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")

Results = dict[str, Any]
"""`AP_KEYS` and AR keys (fractions, None where undefined), protocol, counts, per_category."""


def evaluate_detections(
    ground_truth: GroundTruth | Annotations | str | Path,
    detections: Detections,
    vocabulary: Vocabulary | None = None,
    train_image_counts: Mapping[int, int] | None = None,
    max_detections: int = MAX_DETECTIONS,
) -> Results:
    """LVIS box AP of `detections`, overall and by category.

    `vocabulary` is the detector's; its categories must mean the same as the annotations'.
    `train_image_counts` (category id -> training images) go into the per-category rows; without
    them, the counts that the annotations state. Only the images that the detector saw are
    evaluated (`detections.images`). Raises `DataError` for files that cannot be evaluated.
    """
    truth = read_ground_truth(ground_truth)
    if vocabulary is not None:
        _check_vocabulary(truth, vocabulary)
    num_annotated = len(truth.image_ids)
    if detections.images is not None:
        truth = truth.subset(detections.images)
    matches = match(truth, detections, max_detections)
    figures = accumulate(matches)
    images = f"{len(truth.image_ids):,}"
    if len(truth.image_ids) < num_annotated:
        images += f" of {num_annotated:,}"
    return {
        "protocol": (
            f"LVIS box AP, federated, IoU 0.50:0.95, top {max_detections} detections per image, "
            f"{images} images"
        ),
        **_summary(figures, truth, max_detections),
        "counts": _counts(truth, matches, num_annotated),
        "per_category": _per_category(figures, truth, matches, train_image_counts),
    }


def read_ground_truth(ground_truth: GroundTruth | Annotations | str | Path) -> GroundTruth:
    """Checked annotations, out of whatever form they are in."""
    if isinstance(ground_truth, GroundTruth):
        return ground_truth
    if isinstance(ground_truth, str | Path):
        return parse_ground_truth(load_annotations(ground_truth), str(ground_truth))
    return parse_ground_truth(ground_truth)


def _check_vocabulary(truth: GroundTruth, vocabulary: Vocabulary) -> None:
    names = dict(zip(truth.category_ids.tolist(), truth.names, strict=True))
    for category in vocabulary.categories:
        if names.get(category.id, category.name) != category.name:
            raise DataError(
                f"category {category.id} is {category.name!r} to the detector and "
                f"{names[category.id]!r} to the annotations; evaluate on annotations of the "
                "vocabulary that the detector was trained with"
            )


def _summary(
    figures: FederatedAP, truth: GroundTruth, max_detections: int
) -> dict[str, float | None]:
    summary = {
        "AP": figures.ap(),
        "AP50": figures.ap(iou_threshold=0.5),
        "AP75": figures.ap(iou_threshold=0.75),
    }
    areas = ("small", "medium", "large")
    summary |= {f"AP{area[0]}": figures.ap(area) for area in areas}
    for frequency in "rcf":
        group = np.array([value == frequency for value in truth.frequencies], bool)
        summary[f"AP{frequency}"] = figures.ap(columns=np.flatnonzero(group))
    summary[f"AR@{max_detections}"] = figures.ar()
    return summary | {f"AR{area[0]}@{max_detections}": figures.ar(area) for area in areas}


def _counts(truth: GroundTruth, matches: Matches, num_annotated: int) -> dict[str, Any]:
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
        "detections_over_limit": matches.over_limit,
        "detections_counted": len(matches.score),
    }


def _per_category(
    figures: FederatedAP,
    truth: GroundTruth,
    matches: Matches,
    train_image_counts: Mapping[int, int] | None,
) -> list[dict[str, Any]]:
    size = truth.num_categories
    pairs = np.unique(np.stack([matches.truth_column, matches.truth_image_id]), axis=1)
    images = np.bincount(pairs[0], minlength=size).tolist()
    instances = np.bincount(matches.truth_column, minlength=size).tolist()
    counted = np.bincount(matches.column, minlength=size).tolist()
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

    Writes detections.json, per_category.csv and last results.json, each complete or not at all.
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
    text = _to_json(results | {"step": step})
    _publish(folder / "results.json", text)
    _publish(Path(run_dir) / "results.json", text)
    return folder


def _to_json(results: Results) -> str:
    figures = {key: value for key, value in results.items() if key != "per_category"}
    return json.dumps(figures, indent=2, allow_nan=False) + "\n"


def _publish(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def format_table(results: Results) -> str:
    """The protocol line, the nine figures in aligned columns, and what they were counted on."""
    counts = results["counts"]
    groups = counts["categories_with_ground_truth"]
    return "\n".join(
        [
            results["protocol"],
            "".join(f"{key:>8}" for key in AP_KEYS),
            "".join(f"{format_fraction(results[key]):>8}" for key in AP_KEYS),
            f"{counts['instances']:,} boxes of {groups['all']:,} categories "
            f"({groups['r']:,} rare, {groups['c']:,} common, {groups['f']:,} frequent); "
            f"{counts['detections']:,} detections, {counts['detections_over_limit']:,} beyond the "
            f"limit, {counts['detections_counted']:,} in categories that count",
        ]
    )


def format_fraction(value: float | None) -> str:
    """Four decimals, or a dash where the figure is undefined."""
    return "-" if value is None else f"{value:.4f}"


def evaluate_files(
    annotations: str | Path, detections: str | Path, out: str | Path | None, official: bool
) -> str:
    """Evaluate anybody's LVIS annotations and result json; returns the table as text.

    `out` takes the figures as json. With `official` the `lvis` package runs beside: its figures and
    the differences are in the text and in the json. Raises `DataError` for bad files.
    """
    tree, found = load_annotations(annotations), load_detections(detections)
    results = evaluate_detections(parse_ground_truth(tree, str(annotations)), found)
    text = format_table(results)
    if official:
        results["official"] = official_lvis(tree, found)
        text += "\n" + format_comparison(results, results["official"])
    if out is not None:
        _publish(Path(out), _to_json(results))
    return text


def format_comparison(results: Results, official: Mapping[str, float | None]) -> str:
    """Our figures beside the official package's, with their differences."""
    lines = [f"{'':>8}{'ours':>10}{'official':>10}{'difference':>12}"]
    for key in (key for key in official if key in results):
        ours, theirs = results[key], official[key]
        difference = "-" if ours is None or theirs is None else f"{ours - theirs:.1e}"
        figures = f"{format_fraction(ours):>10}{format_fraction(theirs):>10}"
        lines.append(f"{key:>8}{figures}{difference:>12}")
    return "\n".join(lines)
