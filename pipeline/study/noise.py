"""`longtail study teacher-noise`: how right must a box be for the teacher to know what is in it?"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.errors import RecipeError
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.report.charts import Series, line_chart
from pipeline.report.document import document
from pipeline.report.elements import facts, figure, fraction, grid, legend, note, section, table
from pipeline.study.jitter import DEFINITION
from pipeline.study.output import Outcome, percent
from pipeline.study.teacher_ranks import TOPS, Classified, classify, top, validation_source
from pipeline.study.zero_shot_page import describe_teacher, scope_of

NAME = "teacher-noise"
_STYLES = {1: "c1", 5: "c2", 10: "c3"}
_MOST_LEVELS = 101


def scales_of(levels: int) -> list[float]:
    """So many scales of noise, evenly from 0 to 1; raises `RecipeError` for fewer than 2."""
    if not 2 <= levels <= _MOST_LEVELS:
        raise RecipeError(f"--levels is {levels}; give a number from 2 to {_MOST_LEVELS}")
    return [round(place / (levels - 1), 6) for place in range(levels)]


def noise(
    recipe: Recipe,
    scales: Sequence[float],
    *,
    device: torch.device,
    seed: int = 0,
    images: int | None = None,
) -> Outcome:
    """Classify the validation boxes with the recipe's teacher at noise of each of the `scales`.

    Shards and teacher must be there. Raises as `classify` does.
    """
    source = validation_source(recipe)
    with Progress(f"classifying jittered boxes of {source.name}", "images") as progress:
        found = classify(
            recipe, scales, seed=seed, images=images, device=device, progress=progress.update
        )
    rows = _rows(found)
    lines = [f"top-1/5/10 of {len(found.ranks[0]):,} boxes in percent, by noise of the boxes"]
    for row in rows:
        shares = " / ".join(percent(row[f"top{k}"]) for k in TOPS)
        lines.append(f"  {row['noise']:<6g} {shares}   mean IoU {row['mean_iou']:.3f}")
    figures = {
        "study": NAME,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash(),
        "teacher": recipe.teacher.model_dump(mode="json"),
        "source": source.name,
        "images": found.images,
        "all_images": found.all_images,
        "boxes": len(found.ranks[0]),
        "boxes_without_label": found.unlabelled,
        "seed": seed,
        "definition": DEFINITION,
        "levels": rows,
    }
    return Outcome(f"{NAME}_{recipe.name}", _render(found, rows, seed), rows, figures, lines)


def _rows(found: Classified) -> list[dict[str, Any]]:
    """Shares at each level: of all boxes, then top-1 and top-5 of each group."""
    rows = []
    for level, ranks in zip(found.levels, found.ranks, strict=True):
        row: dict[str, Any] = {"noise": level, "mean_iou": float(ranks.overlap.mean())}
        for group, columns in found.groups.items():
            own = ranks.rank[columns[ranks.column]]
            ending = "" if group == "all" else f"_{group}"
            row |= {f"top{k}{ending}": top(own, k) for k in TOPS}
        rows.append(row)
    return rows


def _render(found: Classified, rows: Sequence[Mapping[str, Any]], seed: int) -> str:
    recipe = found.recipe
    header = facts(
        [
            ("teacher", describe_teacher(recipe)),
            ("boxes of", f"{validation_source(recipe).name}, {scope_of(found)}"),
            ("boxes", f"{len(found.ranks[0]):,}"),
            ("categories", f"{len(found.categories):,}"),
            ("seed", str(seed)),
        ]
    )
    groups = [group for group in found.groups if group != "all"]
    charts = [_chart(rows, "All boxes", [(f"top-{k}", _STYLES[k], f"top{k}") for k in TOPS])]
    for k in (1, 5):
        lines = [(group, group, f"top{k}_{group}") for group in groups]
        if lines:
            charts.append(_chart(rows, f"Top-{k} by frequency of the category", lines))
    charts.append(_overlaps(rows))
    body = [
        section("Accuracy by noise", grid(*charts), note(DEFINITION)),
        section("In numbers", _table(rows, groups)),
    ]
    text = "Ground-truth boxes, jittered by a share of their size and classified by the teacher"
    return document(f"{NAME}: {recipe.name}", text, header, "".join(body))


def _chart(
    rows: Sequence[Mapping[str, Any]], title: str, lines: Sequence[tuple[str, str, str]]
) -> str:
    series = [
        Series(name, style, [(row["noise"], row[key]) for row in rows if row[key] is not None])
        for name, style, key in lines
    ]
    series = [one for one in series if one.points]
    chart = line_chart(
        series,
        title,
        axis_titles=("noise, as a share of the box", "share of boxes"),
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        dots=True,
    )
    return figure(title, legend([(one.name, one.style) for one in series]), chart)


def _overlaps(rows: Sequence[Mapping[str, Any]]) -> str:
    points = [(row["noise"], row["mean_iou"]) for row in rows]
    title = "How much of the boxes is left: mean IoU with the true box"
    chart = line_chart(
        [Series("mean IoU", "c4", points)],
        title,
        axis_titles=("noise, as a share of the box", "IoU"),
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        dots=True,
    )
    return figure(title, legend([("mean IoU", "c4")]), chart)


def _table(rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> str:
    head = ["noise", "mean IoU", *(f"top-{k}" for k in TOPS)]
    head += [f'<span class="{group}">top-{k} {group}</span>' for group in groups for k in (1, 5)]
    cells = [
        [
            f"{row['noise']:g}",
            fraction(row["mean_iou"]),
            *(percent(row[f"top{k}"]) for k in TOPS),
            *(percent(row[f"top{k}_{group}"]) for group in groups for k in (1, 5)),
        ]
        for row in rows
    ]
    return figure("Percent of the boxes", table(head, cells, "steps"))
