"""`longtail study drop-annotations`: training annotations of which a part has been removed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sources.files import decode_text
from pipeline.data.sources.instances import parse_json
from pipeline.data.storage.files import publish_bytes, read_bytes, resolve
from pipeline.data.vocabulary.categories import clean_name
from pipeline.errors import DataError, RecipeError
from pipeline.evaluation.average_precision import protocol_of
from pipeline.evaluation.ground_truth import Annotations
from pipeline.progress import Progress
from pipeline.report.categories import FREQUENCIES
from pipeline.report.charts import Series, line_chart, rank_chart
from pipeline.report.document import document, publish
from pipeline.report.elements import (
    bar_legend,
    breakable,
    count,
    facts,
    figure,
    folded,
    grid,
    legend,
    note,
    section,
    table,
)
from pipeline.study.fewer import Annotated, annotated, check_fraction, choose_kept, without
from pipeline.study.output import percent, write_csv
from pipeline.study.places import recipe_place, refuse_overrides

NAME = "drop-annotations"
FORMS = ("lvis", "coco", "objects365")
_MAX_COLUMNS = 1500
_LISTED = 12


@dataclass(frozen=True)
class Given:
    """An annotation file: its URL, and whether its images have the lists of LVIS."""

    url: str
    federated: bool
    tree: Annotations
    sha256: str


def drop_annotations(
    place: str, overrides: Sequence[str], output: Path, *, fraction: float, seed: int = 0
) -> str:
    """Write `output`, the annotations at `place` without a `fraction` of them; what to print.

    `place` is an annotation json, or `RECIPE.yaml[:SOURCE]`, of which the first train source is
    taken. A page and a csv of the counts go beside `output`. Masks are left out of it, for nothing
    here reads them. Raises `RecipeError` for a fraction, place or output that cannot be, and
    `DataError` for wrong annotations.
    """
    if output.suffix != ".json":
        raise RecipeError(f"-o {output}: the annotations go to a json file; name FILE.json")
    check_fraction(fraction)
    with Progress(NAME, "parts") as progress:
        given = _read(place, overrides)
        if Path(given.url) == Path(resolve(str(output))):
            raise RecipeError(f"-o {output} is the file that is read; name another")
        progress.update(1, 3)
        found = annotated(given.tree, given.url, federated=given.federated)
        if not found.instance.any():
            raise DataError(f"{given.url}: there is no annotation to remove; is it the right file?")
        kept = choose_kept(found, fraction, seed)
        said = _summary(given, found, kept, fraction, seed)
        tree = without(found, kept, said, federated=given.federated)
        progress.update(2, 3)
        publish_bytes(str(output), json.dumps(tree).encode())
        progress.update(3, 3)
    rows = _rows(found, kept)
    write_csv(output.with_suffix(".csv"), rows)
    page = publish(output.with_suffix(".html"), _render(given, output, rows, said))
    return "\n".join([*_lines(output, said), f"page  {page}, with {output.with_suffix('.csv')}"])


def _read(place: str, overrides: Sequence[str]) -> Given:
    of_recipe = recipe_place(place, overrides)
    form = None
    if of_recipe is None:
        refuse_overrides(place, overrides)
        url = resolve(place)
    else:
        recipe, source = of_recipe
        source = source or recipe.data.train[0]
        if source.format not in FORMS:
            raise RecipeError(
                f"{place}: source {source.name} has format {source.format}, and annotations can be "
                f"removed of {', '.join(FORMS)}; name such a source by RECIPE.yaml:SOURCE"
            )
        url, form = resolve(recipe.data.root, source.annotations or ""), source.format
    try:
        data = read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(
            f"{place}: there is no annotation file at {url}; name a json, or "
            "RECIPE.yaml[:SOURCE] whose data are there"
        ) from None
    tree = parse_json(url, decode_text(url, data), _without_mask)
    if not isinstance(tree, dict):
        raise DataError(f"{url}: annotations are a json object, this is {type(tree).__name__}")
    federated = protocol_of(tree, url) == "lvis" if form is None else form == "lvis"
    return Given(url, federated, tree, hashlib.sha256(data).hexdigest())


def _without_mask(entry: dict) -> dict:
    entry.pop("segmentation", None)
    return entry


def _summary(
    given: Given, found: Annotated, kept: NDArray[np.bool_], fraction: float, seed: int
) -> dict[str, Any]:
    """What was done, for the file's own `info` and for people."""
    instances, removed = int(found.instance.sum()), int((~kept).sum())
    pairs = np.unique(np.stack([found.image[~kept], found.column[~kept]]), axis=1)
    with_boxes = np.unique(found.image[found.instance])
    left = np.unique(found.image[found.instance & kept])
    return {
        "of_sha256": given.sha256,
        "fraction": fraction,
        "seed": seed,
        "instances": instances,
        "removed": removed,
        "not_instances": int((~found.instance).sum()),
        "image_categories_with_losses": pairs.shape[1],
        "images": len(given.tree["images"]),
        "images_without_boxes_now": len(with_boxes) - len(left),
        "masks": "left out",
    }


def _rows(found: Annotated, kept: NDArray[np.bool_]) -> list[dict[str, Any]]:
    before, after = found.counts(), found.counts(kept)
    return [
        {
            "category_id": category["id"],
            "name": category.get("name", category["id"]),
            "frequency": category.get("frequency"),
            "before": int(before[k]),
            "after": int(after[k]),
        }
        for k, category in enumerate(found.categories)
    ]


def _lines(output: Path, said: Mapping[str, Any]) -> list[str]:
    return [
        f"{output}: {said['removed']:,} of {said['instances']:,} instances removed "
        f"({said['removed'] / said['instances']:.1%}; {said['fraction']:.0%} asked for), seed "
        f"{said['seed']}",
        f"  images      {said['images']:,}, {said['images_without_boxes_now']:,} of them have lost "
        "all their boxes",
        f"  incomplete  {said['image_categories_with_losses']:,} times a category on an image",
    ]


def _render(
    given: Given, output: Path, rows: Sequence[Mapping[str, Any]], said: Mapping[str, Any]
) -> str:
    share = said["removed"] / said["instances"]
    header = facts(
        [
            ("instances before", f"{said['instances']:,}"),
            ("removed", f"{said['removed']:,}, {share:.1%}"),
            ("left", f"{said['instances'] - said['removed']:,}"),
            ("images", f"{said['images']:,}"),
            ("seed", str(said["seed"])),
            ("read from", Path(given.url).name),
            ("written to", output.name),
        ]
    )
    body = [
        section("Instances of each category", _columns(rows), _curves(rows)),
        section("By frequency group", _groups(rows)),
        section("How they were chosen", *(note(text) for text in _rules(given, said))),
        section("Categories", _losses(rows), _all(rows)),
    ]
    title = f"{NAME}: {said['fraction']:.0%} removed"
    return document(title, f"Annotations of {given.url}", header, "".join(body))


def _rules(given: Given, said: Mapping[str, Any]) -> list[str]:
    texts = [
        "The seed and the ids of the annotations put all instances in one order. The last of each "
        "category is set aside, so that every category keeps one; of the others, the first "
        f"{said['fraction']:.0%} of all instances are removed, as far as there are so many. What "
        "is removed at a fraction is therefore removed at every larger fraction of the same seed, "
        "and does not depend on the order of the file.",
    ]
    if given.federated:
        texts.append(
            f"{said['image_categories_with_losses']:,} times a category lost boxes on an "
            "image. It is then listed there as not exhaustively annotated, and as no negative, so "
            "that an evaluation does not count what was removed as absent (the class loss of "
            "training does, with federated_negatives: sampled). All images stay, and "
            f"{said['images_without_boxes_now']:,} of them have no box any more. The categories' "
            "image_count and instance_count are those of what is left; frequency (r, c, f) stays "
            "as published, since groups must not change with the part that is learnt from."
        )
    else:
        texts.append(
            "A file in COCO's form has no place to say that a category is not exhaustively "
            "annotated on an image: the objects that were removed look absent to whoever learns "
            f"from it. All images stay, and {said['images_without_boxes_now']:,} of them have no "
            "box any more."
        )
    if said["not_instances"]:
        texts.append(
            f"{said['not_instances']:,} annotations are flagged (iscrowd, ignore) or empty; they "
            "are no instances, stay as they are, and are not counted on this page."
        )
    texts.append("Masks are left out of the written file, since nothing here reads them.")
    return texts


def _columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every category as it is now, in the order of before."""
    ranked = sorted((row for row in rows if row["before"]), key=_by_rank)
    every = -(-len(ranked) // _MAX_COLUMNS)
    columns = [
        (
            f"{clean_name(str(row['name']))}: {row['after']:,} of {row['before']:,} instances",
            _style(row),
            float(row["after"]),
        )
        for row in ranked[::every]
    ]
    title = "Instances that are left, categories in the order of before"
    chart = rank_chart(
        columns,
        [(1.0, "one instance")],
        title,
        ("categories by instances before", "instances (logarithmic)"),
    )
    styles = {style for _, style, _ in columns}
    names = [(name, name) for name in FREQUENCIES.values() if name in styles]
    text = note(f"One in {every} categories is drawn.") if every > 1 else ""
    return figure(title, bar_legend(names), f'<div class="wide">{chart}</div>') + text


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both distributions, each in its own order; and the share that is left."""
    lines = []
    for name, style, key in (("before", "plain", "before"), ("after", "c1", "after")):
        counts = sorted((row[key] for row in rows if row[key]), reverse=True)
        lines.append(Series(name, style, [(k, float(n)) for k, n in enumerate(counts, start=1)]))
    title = "Instances before and after, each sorted"
    chart = line_chart(lines, title, axis_titles=("categories by rank", ""), log=True)
    ranked = sorted((row for row in rows if row["before"]), key=_by_rank)
    shares = [(k, row["after"] / row["before"]) for k, row in enumerate(ranked, start=1)]
    of = "Share of a category's instances that is left"
    share = line_chart(
        [Series("left", "c1", [(float(k), value) for k, value in shares])],
        of,
        axis_titles=("categories by rank before", "share left"),
        y_range=(0.0, 1.0),
    )
    return grid(
        figure(title, legend([("before", "plain"), ("after", "c1")]), chart),
        figure(of, legend([("left", "c1")]), share),
    )


def _by_rank(row: Mapping[str, Any]) -> tuple[int, int]:
    return -cast(int, row["before"]), cast(int, row["category_id"])


def _style(row: Mapping[str, Any]) -> str:
    return FREQUENCIES.get(row["frequency"] or "", "plain")


def _groups(rows: Sequence[Mapping[str, Any]]) -> str:
    groups = [("all", "all", list(rows))]
    groups += [
        (name, name, [row for row in rows if row["frequency"] == letter])
        for letter, name in FREQUENCIES.items()
    ]
    cells = []
    for name, style, own in groups:
        seen = [row for row in own if row["before"]]
        if not seen:
            continue
        before, after = (sum(row[key] for row in seen) for key in ("before", "after"))
        single = sum(row["after"] == 1 for row in seen)
        was = sum(row["before"] == 1 for row in seen)
        cells.append(
            [
                f'<span class="{style}">{name}</span>',
                f"{len(seen):,}",
                f"{before:,}",
                f"{after:,}",
                percent(after / before),
                f"{was:,}",
                f"{single:,}",
            ]
        )
    head = [
        "group", "categories", "before", "after", "% left", "with one before", "with one after",
    ]  # fmt: skip
    return figure("Instances", table(head, cells, "names"))


_HEAD = ["category", "before", "after", "% left"]


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            f'<span class="{_style(row)}">{breakable(str(row["name"]))}</span>',
            count(row["before"]),
            count(row["after"]),
            percent(row["after"] / row["before"] if row["before"] else None),
        ]
        for row in rows
    ]


def _losses(rows: Sequence[Mapping[str, Any]]) -> str:
    seen = [row for row in rows if row["before"]]
    lost = sorted(seen, key=lambda row: (row["after"] / row["before"], -row["before"]))
    most = sorted(seen, key=lambda row: (row["after"] - row["before"], row["category_id"]))
    return grid(
        figure("Least is left of", table(_HEAD, _cells(lost[:_LISTED]), "names")),
        figure("Most instances lost", table(_HEAD, _cells(most[:_LISTED]), "names")),
    )


def _all(rows: Sequence[Mapping[str, Any]]) -> str:
    ranked = sorted(rows, key=_by_rank)
    return folded(f"All {len(rows):,} categories", table(_HEAD, _cells(ranked), "names"))
