"""`longtail study frequency`: how long is the tail of a data set?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.preparing import shards_url
from pipeline.data.storage.files import resolve
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.progress import Progress
from pipeline.report.charts import Series, line_chart
from pipeline.report.document import document
from pipeline.report.elements import facts, figure, grid, legend, note, section, table
from pipeline.study.output import Outcome, percent
from pipeline.study.places import recipe_place, refuse_overrides

NAME = "frequency"
STYLES = [f"c{k}{ending}" for ending in ("", " dashed") for k in range(1, 7)]
_FEW = (1, 10, 100)


@dataclass(frozen=True)
class Tail:
    """Instances of each category of one source, most first, without those that have none."""

    label: str
    index: Index
    category_ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    without: int
    """Categories of the vocabulary without a box."""
    unlabelled: int


def frequency(places: Sequence[str], overrides: Sequence[str]) -> Outcome:
    """Count the instances of each category of prepared sources, and draw them on one plot.

    A place is a folder or URL of a source's shards, `RECIPE.yaml:SOURCE`, or `RECIPE.yaml` for all
    of its sources that have labelled boxes. Raises `RecipeError` for more data sets than a plot
    can tell apart, `DataError` for one that is named and has no label, `StorageError` for one that
    is not prepared.
    """
    if not places:
        raise RecipeError("no data set is named; name folders of shards, or recipes")
    with Progress("counting instances", "data sets") as progress:
        found, left_out = _found(places, overrides)
        if len(found) > len(STYLES):
            raise RecipeError(
                f"{len(found)} data sets are named, and one plot tells {len(STYLES)} apart; name "
                "fewer"
            )
        tails = []
        for done, (name, index) in enumerate(_labels(found), start=1):
            tails.append(tail_of(name, index))
            progress.update(done, len(found))
    figures = [_figures(tail) for tail in tails]
    lines = [
        f"{one['name']}: {one['instances']:,} instances of {one['with_instances']:,} categories, "
        f"from {one['most']:,} to {one['least']:,}, half of them over {one['median']:g}"
        for one in figures
    ]
    lines += [f"left out: {text}" for text in left_out]
    names = "_".join(tail.label.replace("/", "_") for tail in tails[:3])
    name = f"{NAME}_{names}" + (f"_and_{len(tails) - 3}_more" if len(tails) > 3 else "")
    page = _render(tails, figures, left_out)
    tree = {"study": NAME, "data_sets": figures, "left_out": left_out}
    return Outcome(name, page, list(_rows(tails)), tree, lines)


def tail_of(label: str, index: Index) -> Tail:
    """The counts of one source, by the columns of its index; `DataError` without a labelled box."""
    labelled = index.category_ids[index.category_ids >= 0]
    numbers, counts = np.unique(labelled, return_counts=True)
    if not len(numbers):
        raise DataError(
            f"{label} at {index.url} has no box with a label, so no category has instances; name "
            "another source"
        )
    order = np.lexsort((numbers, -counts))
    return Tail(
        label=label,
        index=index,
        category_ids=numbers[order].astype(np.int64),
        counts=counts[order],
        without=index.vocabulary.num_categories - len(numbers),
        unlabelled=len(index.category_ids) - len(labelled),
    )


def _found(
    places: Sequence[str], overrides: Sequence[str]
) -> tuple[list[tuple[str, Index]], list[str]]:
    """(place, index) of each data set, and which sources of recipes have no label."""
    found: list[tuple[str, Index]] = []
    left_out = []
    of_recipes = [recipe_place(place, overrides) for place in places]
    if not any(of_recipes):
        refuse_overrides(places[0], overrides)
    for place, of_recipe in zip(places, of_recipes, strict=True):
        if of_recipe is None:
            found.append((place.rstrip("/"), load_index(resolve(place))))
            continue
        recipe, source = of_recipe
        for one in [source] if source else recipe.data.sources:
            try:
                index = load_index(shards_url(recipe.data, one))
            except StorageError as error:
                raise StorageError(f"source {one.name} of {place}: {error}") from None
            if source is None and not (index.category_ids >= 0).any():
                left_out.append(f"{one.name}, whose boxes have no label")
                continue
            found.append((f"{recipe.name}/{one.name}", index))
    # Recipes share sources; each is drawn once.
    once = {index.url: (place, index) for place, index in found}
    return list(once.values()), left_out


def _labels(found: Sequence[tuple[str, Index]]) -> Iterator[tuple[str, Index]]:
    """By the source's own name, or by its place where several have that."""
    names = [index.name for _, index in found]
    for place, index in found:
        yield index.name if names.count(index.name) == 1 else place, index


def _figures(tail: Tail) -> dict[str, Any]:
    counts, total = tail.counts, int(tail.counts.sum())
    head = max(1, round(len(counts) / 10))
    return {
        "name": tail.label,
        "shards": tail.index.url,
        "digest": tail.index.digest,
        "images": tail.index.num_samples,
        "instances": total,
        "categories": tail.index.vocabulary.num_categories,
        "with_instances": len(counts),
        "most": int(counts[0]),
        "median": float(np.median(counts)),
        "least": int(counts[-1]),
        "share_of_first_tenth": float(counts[:head].sum() / total),
        "up_to": {str(few): int((counts <= few).sum()) for few in _FEW},
        "boxes_without_label": tail.unlabelled,
    }


def _rows(tails: Sequence[Tail]) -> Iterator[dict[str, Any]]:
    for tail in tails:
        vocabulary = tail.index.vocabulary
        pairs = zip(tail.category_ids.tolist(), tail.counts.tolist(), strict=True)
        for rank, (number, instances) in enumerate(pairs, start=1):
            category = vocabulary.categories[vocabulary.column_of(number)]
            yield {
                "data_set": tail.label,
                "rank": rank,
                "category_id": number,
                "name": category.name,
                "frequency": category.frequency,
                "instances": instances,
            }


def _render(
    tails: Sequence[Tail], figures: Sequence[Mapping[str, Any]], left_out: Sequence[str]
) -> str:
    header = facts(
        [
            ("data sets", str(len(tails))),
            ("instances", f"{sum(one['instances'] for one in figures):,}"),
        ]
    )
    styled = list(zip(tails, STYLES, strict=False))
    names = legend([(tail.label, style) for tail, style in styled])
    text = (
        "Each line is one data set, its categories sorted by their own instances, so a rank is "
        "another category in each. A category without an instance has no place on a logarithmic "
        "axis, and is counted in the table."
    )
    if left_out:
        text += f" Left out: {'; '.join(left_out)}."
    body = [
        section("Instances of each category, sorted", _by_rank(styled, names), note(text)),
        section("Shape of the tails", _shapes(styled, names)),
        section("In numbers", _table(figures)),
    ]
    title = ", ".join(tail.label for tail in tails[:3])
    more = f" and {len(tails) - 3} more" if len(tails) > 3 else ""
    about = "Instances of each category in prepared data sets"
    return document(f"{NAME}: {title}{more}", about, header, "".join(body))


def _by_rank(styled: Sequence[tuple[Tail, str]], names: str) -> str:
    series = [
        Series(tail.label, style, [(float(k), float(n)) for k, n in enumerate(tail.counts, 1)])
        for tail, style in styled
    ]
    title = "Instances by rank of the category"
    chart = line_chart(
        series,
        title,
        size=(1040, 420),
        axis_titles=("categories by rank", _axis(tails=[tail for tail, _ in styled])),
        log=True,
    )
    return figure(title, names, f'<div class="wide">{chart}</div>')


def _axis(tails: Sequence[Tail]) -> str:
    wide = max(tail.counts[0] for tail in tails) > 30 * min(tail.counts[-1] for tail in tails)
    return "instances (logarithmic)" if wide else "instances"


def _shapes(styled: Sequence[tuple[Tail, str]], names: str) -> str:
    """The same on shares of categories, against the most frequent one; and what the head holds."""
    relative, gathered = [], []
    for tail, style in styled:
        places = (np.arange(len(tail.counts)) + 1) / len(tail.counts)
        shares = tail.counts / tail.counts[0]
        held = np.cumsum(tail.counts) / tail.counts.sum()
        relative.append(
            Series(tail.label, style, list(zip(places.tolist(), shares.tolist(), strict=True)))
        )
        points = [(0.0, 0.0), *zip(places.tolist(), held.tolist(), strict=True)]
        gathered.append(Series(tail.label, style, points))
    first = "Instances, as a share of the most frequent category's"
    second = "Share of all instances that the first categories hold"
    axis = "share of the categories, most frequent first"
    charts = [
        line_chart(relative, first, axis_titles=(axis, "share"), x_range=(0.0, 1.0), log=True),
        line_chart(
            gathered, second, axis_titles=(axis, "share"), x_range=(0.0, 1.0), y_range=(0.0, 1.0)
        ),
    ]
    return grid(figure(first, names, charts[0]), figure(second, names, charts[1]))


def _table(figures: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "data set", "images", "instances", "categories", "without", "most", "median", "least",
        "ratio", *(f"\u2264 {few}" for few in _FEW), "head, %",
    ]  # fmt: skip
    cells = [
        [
            one["name"],
            f"{one['images']:,}",
            f"{one['instances']:,}",
            f"{one['with_instances']:,}",
            f"{one['categories'] - one['with_instances']:,}",
            f"{one['most']:,}",
            f"{one['median']:,g}",
            f"{one['least']:,}",
            f"{one['most'] / one['least']:,.0f}",
            *(f"{one['up_to'][str(few)]:,}" for few in _FEW),
            percent(one["share_of_first_tenth"]),
        ]
        for one in figures
    ]
    text = note(
        '"Without": categories of the vocabulary that have no instance. "Ratio": of the most to '
        'the least. "\u2264": categories with so many instances or fewer. "Head": share of all '
        "instances that the most frequent tenth of the categories has."
    )
    return figure("Data sets", table(head, cells, "steps")) + text
