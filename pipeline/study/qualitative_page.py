"""The page of `longtail study qualitative`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.sample import Sample
from pipeline.data.shards.index import Index
from pipeline.evaluation.annotated_boxes import iou_by_row
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.examples import SAME_OBJECT_IOU
from pipeline.recipe import Recipe
from pipeline.report.charts import share_bar
from pipeline.report.document import document
from pipeline.report.elements import (
    bar_legend,
    breakable,
    count,
    facts,
    figure,
    note,
    section,
    table,
)
from pipeline.study.output import percent
from pipeline.study.rare_objects import LEAST_IOU, RareObjects
from pipeline.study.side_by_side import Shown, Side, pair

MOST_DRAWN = 20
_CASES = (("both", "both", "c3"), ("only_a", "only A", "c1"), ("only_b", "only B", "c2"),
          ("neither", "neither", "plain"))  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """Two checkpoints on all validation images that have a rare object."""

    recipe: Recipe
    index: Index
    titles: tuple[str, str]
    places: tuple[str, str]
    detections: tuple[Detections, Detections]
    """Those at or over the score threshold."""
    objects: RareObjects
    score_threshold: float
    seed: int


def render(
    compared: Compared,
    chosen: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Any],
) -> str:
    header = facts(
        [
            ("A", compared.places[0]),
            ("B", compared.places[1]),
            ("images of", f"{compared.index.name}, {figures['images_with_rare_objects']:,} with "
             "rare objects"),
            ("rare objects", f"{figures['rare_objects']:,}"),
            ("least score", f"{compared.score_threshold:g}"),
        ]
    )  # fmt: skip
    body = [
        section("How often each side wins", _score(figures)),
        section("Side by side", *_pictures(compared, chosen, figures)),
        section("Rare categories", _categories(rows)),
    ]
    text = "Two checkpoints on the same images: which rare objects does only one of them find?"
    return document(f"qualitative: {compared.recipe.name}", text, header, "".join(body))


def _score(figures: Mapping[str, Any]) -> str:
    outcomes, total = figures["outcomes"], figures["rare_objects"]
    bar = share_bar(
        [(words, style, outcomes[key] / total) for key, words, style in _CASES if outcomes[key]],
        "Rare objects by who finds them",
    )
    names = [(f"{words}: {outcomes[key]:,}", style) for key, words, style in _CASES]
    cells = [
        [words, f"{outcomes[key]:,}", percent(outcomes[key] / total)] for key, words, _ in _CASES
    ]
    text = note(
        f"All {total:,} rare objects of the validation images. An object is found by a detection "
        f"of its own category with IoU of {LEAST_IOU:g} or more and a score of "
        f"{figures['score_threshold']:g} or more; each detection finds one object. False alarms do "
        "not count here: AP has them."
    )
    return (
        figure("Found by", bar_legend(names), bar)
        + text
        + figure("Rare objects", table(["found by", "objects", "% of all"], cells, "names"))
    )


def _pictures(
    compared: Compared, chosen: Sequence[int], figures: Mapping[str, Any]
) -> tuple[str, ...]:
    differing = figures["images_where_they_differ"]
    if not chosen:
        return (note("Both find the same rare objects on every image, so there is none to show."),)
    outcomes = figures["outcomes"]
    how = (
        f"These are {len(chosen)} of the {differing:,} images on which exactly one of the two "
        f"finds a rare object, drawn by chance with seed {compared.seed} and nothing else: not by "
        "which side wins, and not by looks."
        if len(chosen) < differing
        else f"These are all {differing:,} images on which exactly one of the two finds a rare "
        "object."
    )
    how += (
        f" Images where they agree are never shown, so the pictures say where the two differ, and "
        f"the counts above how often (only A {outcomes['only_a']:,}, only B "
        f"{outcomes['only_b']:,})."
    )
    key = (
        '<p class="note"><span class="rare">Thick red: rare objects that are found</span>, with '
        "name and score. Dashed red: rare objects that are not. Thin: the best other detections, "
        "until there are as many as ground-truth boxes, of overlapping ones the best; red ones "
        "name a rare category and find nothing of it, blue ones name another category. Yellow "
        "arrows: rare objects that only one of the two finds, filled on its picture, hollow on the "
        "other. All names show on hover.</p>"
    )
    places = {int(number): place for place, number in enumerate(compared.index.image_id)}
    pairs = []
    for number in chosen:
        sample = compared.index.read(places[number])
        pairs.append(pair(sample, [_side(compared, sample, which) for which in (0, 1)]))
    return note(how), key, f'<div class="pictures">{"".join(pairs)}</div>'


def _side(compared: Compared, sample: Sample, which: int) -> Side:
    vocabulary, objects = compared.index.vocabulary, compared.objects
    rows = np.flatnonzero(objects.image_id == sample.image_id).tolist()
    detections = compared.detections[which]

    def truth(row: int) -> Shown:
        name = vocabulary.names[vocabulary.column_of(int(objects.category_id[row]))]
        return Shown(name, True, _box(objects.bbox[row]))

    def detection(row: int) -> Shown:
        column = vocabulary.column_of(int(detections.category_id[row]))
        category = vocabulary.categories[column]
        rare, score = category.frequency == "r", float(detections.score[row])
        return Shown(category.name, rare, _box(detections.bbox[row]), score)

    finders = objects.finder[rows, which]
    finders = finders[finders >= 0]
    return Side(
        title=compared.titles[which],
        finders=[detection(row) for row in finders.tolist()],
        others=[detection(row) for row in _others(detections, sample, finders)],
        missed=[truth(row) for row in rows if not objects.found[row, which]],
        arrows=[
            (truth(row), bool(objects.found[row, which])) for row in rows if objects.decided[row]
        ],
    )


def _others(detections: Detections, sample: Sample, finders: np.ndarray) -> list[int]:
    """Rows of the best detections of an image that find no rare object: as many as leave the
    picture with a detection for each ground-truth box, and of overlapping ones the best."""
    taken = finders.tolist()
    rows = np.flatnonzero(detections.image_id == sample.image_id)
    for row in rows[np.argsort(-detections.score[rows], kind="stable")].tolist():
        if len(taken) >= min(len(sample.boxes), MOST_DRAWN):
            break
        box = np.broadcast_to(detections.bbox[row], (len(taken), 4))
        if not (iou_by_row(box, detections.bbox[taken]) > SAME_OBJECT_IOU).any():
            taken.append(row)
    return taken[len(finders) :]


def _box(bbox: np.ndarray) -> tuple[float, float, float, float]:
    x, y, width, height = bbox.tolist()
    return x, y, width, height


def _categories(rows: Sequence[Mapping[str, Any]]) -> str:
    ordered = sorted(rows, key=lambda row: (row["only_a"] - row["only_b"], row["name"]))
    cells = [
        [
            f'<span class="rare">{breakable(row["name"])}</span>',
            *(
                count(row[key])
                for key in ("objects", "found_by_a", "found_by_b", "only_a", "only_b")
            ),
        ]
        for row in ordered
    ]
    head = ["category", "objects", "A finds", "B finds", "only A", "only B"]
    text = note("From those where B finds most that A misses, to those where A does.")
    return figure("Found of each category", table(head, cells, "names")) + text
