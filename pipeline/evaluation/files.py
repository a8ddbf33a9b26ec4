"""`longtail evaluate --annotations GT --detections DT`: anybody's files, under a named protocol."""

import os
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.evaluation.average_precision import evaluate_coco, evaluate_voc, protocol_of
from pipeline.evaluation.detections import Detections, load_detections
from pipeline.evaluation.entries import is_whole, read_json, refuse, unique_ids
from pipeline.evaluation.ground_truth import Annotations, load_annotations, parse_ground_truth
from pipeline.evaluation.official import official_lvis
from pipeline.evaluation.results import Results, evaluate_detections
from pipeline.evaluation.tables import format_comparison, format_table
from pipeline.evaluation.voc_ap import Year

COCO_STYLE = {
    "coco": "COCO",
    "objects365": "Objects365",
    "openimages": "OpenImages",
    "visual_genome": "Visual Genome",
}
VOC = {f"voc{year}": year for year in get_args(Year)}


def evaluate_files(
    annotations: str | Path,
    detections: str | Path,
    *,
    protocol: str | None = None,
    images: str | Path | None = None,
    score_threshold: float | None = None,
    official: bool = False,
) -> tuple[str, Results]:
    """Evaluate a result json on a ground-truth json; the table as text, and all figures.

    Without a `protocol` (lvis, coco, objects365, openimages, visual_genome, voc2007, voc2010),
    annotations with `neg_category_ids` are evaluated as LVIS, others as COCO. `images` names a file
    with the images to evaluate, see `read_image_ids`. With `official` the `lvis` package runs
    beside: its figures and the differences are in the text and in the results. Raises `DataError`
    for bad files, `RecipeError` for options that cannot be.
    """
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise RecipeError(f"--score-threshold {score_threshold} is no score: give one from 0 to 1")
    tree, origin = load_annotations(annotations), str(annotations)
    own_protocol = protocol_of(tree, origin)
    protocol = protocol or own_protocol
    if official and protocol != "lvis":
        raise RecipeError(
            f"--official belongs to the LVIS protocol, this is {protocol}; leave it out, or say "
            "--protocol lvis"
        )
    chosen = None
    if images is not None:
        chosen = read_image_ids(images)
        known = unique_ids(tree["images"], f"{origin}: images")
        unknown = ~np.isin(chosen, known)
        refuse(unknown, chosen, "is not an image of the annotations", str(images))
    if protocol != "lvis":
        results = _evaluate_exhaustive(
            tree, load_detections(detections), protocol, origin, chosen, score_threshold
        )
        return format_table(results), results
    truth = parse_ground_truth(tree, origin)
    if not official:
        del tree  # Many times the memory of the arrays.
    found = load_detections(detections)
    results = evaluate_detections(truth, found, score_threshold=score_threshold, images=chosen)
    text = format_table(results)
    if official:
        part = found if chosen is None else found.on_images(chosen)
        results["official"] = official_lvis(tree, part)
        text += "\n" + format_comparison(results, results["official"])
    return text, results


def _evaluate_exhaustive(
    tree: Annotations,
    found: Detections,
    protocol: str,
    origin: str,
    images: NDArray[np.int64] | None,
    score_threshold: float | None,
) -> Results:
    chosen = None if images is None else images.tolist()
    if protocol in VOC:
        return evaluate_voc(
            tree,
            found,
            origin=origin,
            year=VOC[protocol],
            images=chosen,
            score_threshold=score_threshold,
        )
    return evaluate_coco(
        tree,
        found,
        origin=origin,
        name=COCO_STYLE[protocol],
        images=chosen,
        score_threshold=score_threshold,
    )


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before an hour is spent on what goes into it."""
    if path.is_dir():
        raise RecipeError(f"--json {path} is a directory; name a file")
    if not path.parent.is_dir():
        raise RecipeError(f"--json {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"--json {path}: the folder {path.parent} cannot be written to")


def read_image_ids(path: str | Path) -> NDArray[np.int64]:
    """Image ids of a subset: a json list of ids, or the json of a data set with those `images`."""
    tree = read_json(path)
    if isinstance(tree, dict) and isinstance(tree.get("images"), list) and tree["images"]:
        return unique_ids(tree["images"], f"{path}: images")
    wrong = [value for value in tree if not is_whole(value)] if isinstance(tree, list) else None
    if not isinstance(tree, list) or wrong or not tree:
        raise DataError(
            f"{path}: a subset is a json list of image ids (whole numbers below 2^63), or a json "
            f"with `images` (as that of LVIS minival){f', not {wrong[:3]}' if wrong else ''}"
        )
    return np.unique(np.array(tree, np.int64))
