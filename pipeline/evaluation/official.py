"""The official `lvis` package behind one fence: evaluation's only import of it.

As published (0.5.3) it uses `np.float`, which numpy removed; sets up the root logger when imported;
needs OpenCV and matplotlib for drawing that nobody asked for; and fails on an empty list of
detections. All four are dealt with here, without touching numpy, logging or the caller's data.
"""

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pipeline.evaluation.detections import Detections
from pipeline.evaluation.federated_ap import MAX_DETECTIONS
from pipeline.evaluation.ground_truth import Annotations, load_annotations


def official_lvis(
    ground_truth: Annotations | str | Path,
    detections: Detections,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, float | None]:
    """Box AP and AR as the `lvis` package computes them; None where it says -1 (undefined)."""
    tree = load_annotations(ground_truth) if isinstance(ground_truth, str | Path) else ground_truth
    dataset = _bare(tree, detections)
    return run_package(dataset, _rows(dataset, detections), max_detections)


def run_package(
    dataset: dict[str, Any], rows: list[dict[str, Any]], max_detections: int = MAX_DETECTIONS
) -> dict[str, float | None]:
    """The package on its own input: an LVIS tree and result entries, one or more.

    It writes into both. Annotation ids must not be 0, which it takes for no match.
    """
    with _quiet_logging():
        package = _import_lvis()
        truth = package.LVIS.__new__(package.LVIS)
        truth.logger = logging.getLogger("lvis.lvis")
        truth.dataset = dataset
        truth._create_index()
        results = package.LVISResults(truth, rows, max_dets=max_detections)
        evaluation = package.LVISEval(truth, results, iou_type="bbox")
        evaluation.params.max_dets = max_detections
        evaluation.run()
    return {key: None if value == -1 else float(value) for key, value in evaluation.results.items()}


def _bare(tree: Annotations, detections: Detections) -> dict[str, Any]:
    """Only what the package reads, copied, because it writes into what it is given; annotation ids
    are numbered anew."""
    keys = ("image_id", "category_id", "bbox", "area", "ignore")
    images, annotations = tree["images"], tree["annotations"]
    if detections.images is not None:
        seen = set(detections.images.tolist())
        images = [image for image in images if image["id"] in seen]
        annotations = [row for row in annotations if row["image_id"] in seen]
    return {
        "images": [dict(image) for image in images],
        "categories": [dict(category) for category in tree["categories"]],
        "annotations": [
            {"id": position + 1, **{key: row[key] for key in keys if key in row}}
            for position, row in enumerate(annotations)
        ],
    }


def _rows(dataset: dict[str, Any], detections: Detections) -> list[dict[str, Any]]:
    rows = list(detections.to_rows())
    if rows or not dataset["images"] or not dataset["categories"]:
        return rows
    # A box without area is never counted, and a list with one entry is not empty.
    place = {"image_id": dataset["images"][0]["id"], "category_id": dataset["categories"][0]["id"]}
    return [{**place, "bbox": [0.0, 0.0, 0.0, 0.0], "score": 0.0}]


def _import_lvis() -> ModuleType:
    if "lvis" not in sys.modules:
        drawing = ModuleType("lvis.vis")
        drawing.LVISVis = None  # type: ignore[attr-defined]
        sys.modules["lvis.vis"] = drawing
        try:
            importlib.import_module("lvis")
        finally:
            del sys.modules["lvis.vis"]
    evaluator: Any = importlib.import_module("lvis.eval")
    if not hasattr(evaluator.np, "float"):
        numpy_with_float = ModuleType("numpy")
        numpy_with_float.__dict__.update(vars(np), float=float)
        evaluator.np = numpy_with_float
    return sys.modules["lvis"]


@contextmanager
def _quiet_logging() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("lvis")
    handlers, level, own_level = list(root.handlers), root.level, own.level
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        own.setLevel(own_level)
