"""`longtail evaluate --annotations GT --detections DT`: anybody's files, under a named protocol."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, RecipeError
from pipeline.evaluation.average_precision import evaluate_coco, evaluate_voc, protocol_of
from pipeline.evaluation.detections import Detections, load_detections
from pipeline.evaluation.ground_truth import (
    Annotations,
    load_annotations,
    parse_ground_truth,
    read_json,
)
from pipeline.evaluation.official import official_lvis
from pipeline.evaluation.results import (
    Results,
    evaluate_detections,
    format_comparison,
    format_table,
    save_results,
)
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
    out: str | Path | None = None,
    official: bool = False,
) -> str:
    """Evaluate a result json on a ground-truth json; returns the table as text.

    Without a `protocol` (lvis, coco, objects365, openimages, visual_genome, voc2007, voc2010),
    annotations with `neg_category_ids` are evaluated as
    LVIS, others as COCO. `images` names a file with the images to evaluate, see `read_image_ids`.
    `out` takes all figures as json. With `official` the `lvis` package runs beside: its figures and
    the differences are in the text and in the json. Raises `DataError` for bad files.
    """
    tree, found = load_annotations(annotations), load_detections(detections)
    origin = str(annotations)
    if protocol is None:
        protocol = protocol_of(tree, origin)
    if images is not None:
        found = only_images(found, read_image_ids(images))
    if protocol != "lvis" and (official or score_threshold is not None):
        raise RecipeError(
            f"--official and --score-threshold belong to the LVIS protocol, this is {protocol}; "
            "leave them out, or say --protocol lvis"
        )
    results = _evaluate(tree, found, protocol, origin, score_threshold)
    text = format_table(results)
    if official:
        results["official"] = official_lvis(tree, found)
        text += "\n" + format_comparison(results, results["official"])
    if out is not None:
        save_results(Path(out), results)
    return text


def _evaluate(
    tree: Annotations,
    found: Detections,
    protocol: str,
    origin: str,
    score_threshold: float | None,
) -> Results:
    if protocol == "lvis":
        truth = parse_ground_truth(tree, origin)
        return evaluate_detections(truth, found, score_threshold=score_threshold)
    if protocol in VOC:
        return evaluate_voc(tree, found, origin=origin, year=VOC[protocol])
    return evaluate_coco(tree, found, origin=origin, name=COCO_STYLE[protocol])


def read_image_ids(path: str | Path) -> NDArray[np.int64]:
    """Image ids of a subset: a json list of ids, or the json of a data set with those `images`."""
    tree = read_json(path)
    if isinstance(tree, dict) and isinstance(tree.get("images"), list):
        tree = [image.get("id") for image in tree["images"] if isinstance(image, dict)]
    wrong = [value for value in tree if type(value) is not int] if isinstance(tree, list) else None
    if not isinstance(tree, list) or wrong or not tree:
        raise DataError(
            f"{path}: a subset is a json list of whole image ids, or a json with `images` (as that "
            f"of LVIS minival){f', not {wrong[:3]}' if wrong else ''}"
        )
    return np.unique(np.array(tree, np.int64))


def only_images(found: Detections, image_ids: Sequence[int] | NDArray[np.int64]) -> Detections:
    """The detections on some images, which are then all that is evaluated."""
    chosen = np.asarray(image_ids, np.int64)
    rows = np.isin(found.image_id, chosen)
    return replace(
        found,
        image_id=found.image_id[rows],
        category_id=found.category_id[rows],
        bbox=found.bbox[rows],
        score=found.score[rows],
        images=chosen,
    )
