"""`longtail study qualitative`: which rare objects does only one of two checkpoints find?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.preparing import shards_url
from pipeline.data.stream.batches import EvaluationSet
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import DataError, RecipeError
from pipeline.evaluation.detect import detect
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.predict import LoadedDetector, load_detector
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.study.output import Outcome
from pipeline.study.qualitative_page import Compared, render
from pipeline.study.rare_objects import LEAST_IOU, RareObjects, find
from pipeline.training.locate import locate_checkpoint

NAME = "qualitative"
_LETTERS = ("A", "B")


def qualitative(
    recipe: Recipe,
    checkpoints: Sequence[str],
    *,
    images: int,
    score_threshold: float,
    seed: int,
    device: torch.device,
) -> Outcome:
    """Show two checkpoints side by side on validation images where they differ on rare objects.

    Both see the images as `recipe` evaluates them. Raises `RecipeError` without a validation
    source or rare categories and for checkpoints of other vocabularies, `StorageError` for what is
    not there.
    """
    if images < 1:
        raise RecipeError(f"--images is {images}; give a number of images from 1 on")
    if not 0 <= score_threshold <= 1:
        raise RecipeError(f"--score-threshold is {score_threshold:g}; give a score from 0 to 1")
    compared = _compare(recipe, checkpoints, score_threshold, seed, device)
    chosen = compared.objects.choose_images(images, seed)
    outcomes, rows = compared.objects.outcomes(), _rows(compared)
    total = len(compared.objects.image_id)
    figures = {
        "study": NAME,
        "recipe": recipe.name,
        "a": compared.places[0],
        "b": compared.places[1],
        "score_threshold": score_threshold,
        "iou": LEAST_IOU,
        "seed": seed,
        "rare_objects": total,
        "images_with_rare_objects": len(np.unique(compared.objects.image_id)),
        "outcomes": outcomes,
        "images_where_they_differ": len(_differing(compared)),
        "shown": chosen,
    }
    lines = [f"{letter}  {place}" for letter, place in zip("AB", compared.places, strict=True)]
    lines.append(
        f"of {total:,} rare objects both find {outcomes['both']:,}, only A {outcomes['only_a']:,}, "
        f"only B {outcomes['only_b']:,}, neither {outcomes['neither']:,}"
    )
    page = render(compared, chosen, rows, figures)
    return Outcome(f"{NAME}_{recipe.name}", page, rows, figures, lines)


def _compare(
    recipe: Recipe,
    checkpoints: Sequence[str],
    score_threshold: float,
    seed: int,
    device: torch.device,
) -> Compared:
    source = recipe.data.validation
    if source is None:
        raise RecipeError(
            f"recipe {recipe.name} has no data.validation, on whose images the checkpoints would "
            "be compared; add the source"
        )
    # Looked for before anything is read: a wrong path is told at once.
    located = [locate_checkpoint(place) for place in checkpoints]
    index = load_index(shards_url(recipe.data, source))
    detectors = [load_detector(one, device=device) for one in located]
    for place, detector in zip(checkpoints, detectors, strict=True):
        _check_vocabulary(place, detector.vocabulary, index)
    image_id, category_id, bbox = _rare_boxes(index)
    shown_on = np.unique(image_id)
    found = [
        _detect(recipe, detector, index, shown_on, letter).above(score_threshold)
        for detector, letter in zip(detectors, _LETTERS, strict=True)
    ]
    objects = RareObjects(
        image_id,
        category_id,
        bbox,
        np.stack([find(image_id, category_id, bbox, one) for one in found], axis=1),
    )
    named = [f"{one.manifest.recipe['name']}, step {one.manifest.step:,}" for one in located]
    same = named[0] == named[1]
    titles = [
        f"{letter}: {place if same else name}"
        for letter, place, name in zip(_LETTERS, checkpoints, named, strict=True)
    ]
    places = [f"{name} ({one.directory})" for name, one in zip(named, located, strict=True)]
    return Compared(
        recipe,
        index,
        (titles[0], titles[1]),
        (places[0], places[1]),
        (found[0], found[1]),
        objects,
        score_threshold,
        seed,
    )


def _check_vocabulary(place: str, vocabulary: Vocabulary, index: Index) -> None:
    if vocabulary != index.vocabulary:
        raise RecipeError(
            f"checkpoint {place} has another vocabulary than the validation source {index.name}: "
            f"{vocabulary.difference(index.vocabulary)}; compare checkpoints of its categories"
        )


def _rare_boxes(index: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image id, category id and xywh box of every rare object, in the order of the images."""
    rare = {c.id for c in index.vocabulary.categories if c.frequency == "r"}
    if not rare:
        raise RecipeError(
            f"the validation source {index.name} names no category rare (frequency r), as LVIS "
            "does; this study compares checkpoints on rare objects"
        )
    is_rare = np.isin(index.category_ids, sorted(rare))
    owners = np.repeat(np.arange(index.num_samples), np.diff(index.category_offsets))
    places = np.unique(owners[is_rare]).tolist()
    if not places:
        raise DataError(f"no image of the validation source {index.name} has a rare object")
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with Progress("looking up rare objects", "images") as progress:
        for done, place in enumerate(places, start=1):
            sample = index.read(place)
            rows = np.isin(sample.category_ids, sorted(rare))
            boxes = sample.boxes[rows].astype(np.float64)
            boxes[:, 2:] -= boxes[:, :2]
            image = np.full(int(rows.sum()), sample.image_id, np.int64)
            parts.append((image, sample.category_ids[rows], boxes))
            progress.update(done, len(places))
    images, categories, boxes_of = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(categories), np.concatenate(boxes_of)


def _detect(
    recipe: Recipe, detector: LoadedDetector, index: Index, images: np.ndarray, letter: str
) -> Detections:
    evaluation = EvaluationSet(recipe.data, index, detector.vocabulary, images)
    done = 0
    with Progress(f"detecting with {letter}", "images") as progress:

        def count_up(finished: int) -> None:
            nonlocal done
            done += finished
            progress.update(done, evaluation.num_images)

        return detect(
            detector.detector,
            evaluation.iterate(recipe.evaluation.batch_size),
            detector.device,
            recipe.evaluation.max_detections,
            detector.vocabulary,
            progress=count_up,
        )


def _differing(compared: Compared) -> np.ndarray:
    return np.unique(compared.objects.image_id[compared.objects.decided])


def _rows(compared: Compared) -> list[dict[str, Any]]:
    """One row a rare category that has objects: how many each side finds."""
    objects, vocabulary = compared.objects, compared.index.vocabulary
    rows = []
    for number in np.unique(objects.category_id).tolist():
        own = objects.category_id == number
        first, second = objects.found[own].T
        rows.append(
            {
                "category_id": number,
                "name": vocabulary.names[vocabulary.column_of(number)],
                "objects": int(own.sum()),
                "found_by_a": int(first.sum()),
                "found_by_b": int(second.sum()),
                "only_a": int((first & ~second).sum()),
                "only_b": int((second & ~first).sum()),
            }
        )
    return rows
