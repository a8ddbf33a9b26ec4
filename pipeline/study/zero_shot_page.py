"""The page of `longtail study teacher-zero-shot`."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pipeline.data.vocabulary.categories import clean_name
from pipeline.recipe import Recipe
from pipeline.report.categories import FREQUENCIES, trend
from pipeline.report.charts import Mark, Series, line_chart, scatter_chart
from pipeline.report.document import document
from pipeline.report.elements import (
    DASH,
    breakable,
    count,
    facts,
    figure,
    folded,
    grid,
    legend,
    mark_legend,
    note,
    section,
    table,
)
from pipeline.semantics.clip import model_config
from pipeline.semantics.towers.choice import regions_of
from pipeline.study.output import percent
from pipeline.study.teacher_ranks import TOPS, Classified

_MOST_RANKS = 50
_EXTREMES = 12
_READ = {"dense": "from a map of the image", "crops": "as crops"}


def describe_teacher(recipe: Recipe) -> str:
    """Model, weights, text and how boxes are read, in a few words."""
    teacher = recipe.teacher
    weights = "trained by the recipe" if teacher.train is not None else str(teacher.pretrained)
    given = teacher.text_embeddings
    text = f"prompts {teacher.prompts}" if given is None else f"text of {PurePath(given).name}"
    regions = regions_of(teacher, model_config(teacher.model))
    return f"{teacher.model}, {weights}, {text}, boxes read {_READ[regions]}"


def describe_labels(figures: Mapping[str, Any]) -> str:
    """How sharp soft labels are, and which names limit them."""
    one, other = figures["closest_names"]
    return (
        f"temperature {figures['temperature']:.1f}; a soft label spreads over "
        f"{figures['categories_of_a_soft_label']:.1f} categories (exp of its entropy, mean); names "
        f"most alike: {one} and {other}, cosine {figures['closest_cosine']:.3f}"
    )


def scope_of(found: Classified) -> str:
    """Which images were looked at, and what was left out."""
    text = f"{found.images:,} images"
    if found.images < found.all_images:
        text = f"{found.images:,} of {found.all_images:,} images, drawn by the seed"
    if found.unlabelled:
        text += f"; {found.unlabelled:,} boxes without a label left out"
    return text


def three(shares: Mapping[str, float | None]) -> str:
    """Top-1, 5 and 10 in percent."""
    return " / ".join(percent(shares[f"top{k}"]) for k in TOPS)


def render(found: Classified, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> str:
    recipe = found.recipe
    transforms, scale = recipe.data.transforms, recipe.teacher.image_scale
    scaled = "" if scale == 1 else f", then times {scale:g}"
    header = facts(
        [
            ("teacher", describe_teacher(recipe)),
            ("boxes of", f"{figures['source']}, {scope_of(found)}"),
            ("boxes", f"{figures['boxes']:,}"),
            ("categories", f"{figures['categories']:,}"),
            ("soft labels", describe_labels(figures)),
            (
                "image size",
                f"short side {transforms.evaluation_short_side}, long side up to "
                f"{transforms.evaluation_max_side}{scaled}",
            ),
        ]
    )
    body = [
        section(
            "Accuracy",
            _cards(figures),
            note(
                "Large: the share of boxes, in percent, whose own category is the teacher's first "
                "of all. Every category of the data set competes; a tie counts as wrong."
            ),
            _measures(figures),
        ),
        section("At which place the right category comes", grid(_places(found), _chances(figures))),
        section("Categories", _scatter(rows), _extremes(rows), _all_categories(rows)),
    ]
    text = "Ground-truth boxes, classified by the frozen teacher alone"
    return document(f"teacher-zero-shot: {recipe.name}", text, header, "".join(body))


def _cards(figures: Mapping[str, Any]) -> str:
    cards = []
    for group, shares in figures["per_box"].items():
        more = "".join(
            f'<tr><td>top-{k}</td><td></td><td class="value">{percent(shares[f"top{k}"])}</td></tr>'
            for k in TOPS[1:]
        )
        boxes = figures["boxes_of"][group]
        cards.append(
            f'<div class="card {group}"><span class="figure">{percent(shares["top1"])}</span>'
            f'<span class="key">top-1</span><span class="what">{group}, {boxes:,} boxes</span>'
            f'<table class="against">{more}</table></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _measures(figures: Mapping[str, Any]) -> str:
    """Averages over boxes and over categories, what is published, and chance."""
    groups = list(figures["per_box"])
    head = ["percent", *(f'<span class="{group}">{group}</span>' for group in groups)]
    kinds = [("per_box", "mean over boxes"), ("per_category", "mean over categories")]
    rows = [
        [f"top-{k}, {words}", *(percent(figures[key][group][f"top{k}"]) for group in groups)]
        for key, words in kinds
        for k in TOPS
    ]
    parts = []
    if figures["published"]:
        rows += [
            [
                f"top-{k}, published",
                *(percent(figures["published"].get(group, {}).get(f"top{k}")) for group in groups),
            ]
            for k in TOPS
        ]
        parts.append(
            note(
                "Published: RichSem's supplement, Table 2, CLIP RN50 on the boxes of LVIS v1 val. "
                "It does not say whether it averages over boxes or over categories, nor with "
                "which prompts; so both averages stand here."
            )
        )
    else:
        parts.append(
            note(
                "The published figures (RichSem's supplement, Table 2) are of the 1203 categories "
                "of LVIS, which these are not, so they are not shown."
            )
        )
    return figure("Two ways to average", table(head, rows, "names")) + "".join(parts)


def _places(found: Classified) -> str:
    """For each group the share of boxes whose category is among the first k."""
    ranks, size = found.ranks[0], len(found.categories)
    most = min(size, _MOST_RANKS)
    series = []
    for group, columns in found.groups.items():
        own = ranks.rank[columns[ranks.column]]
        if len(own):
            points = [(float(k), float((own < k).mean())) for k in range(1, most + 1)]
            series.append(Series(group, group, points))
    chance = [(float(k), k / size) for k in (1, most)]
    series.append(Series("chance", "plain dashed", chance))
    title = "Share of boxes whose category is among the first k"
    chart = line_chart(
        series,
        title,
        axis_titles=("k", "share of boxes"),
        x_range=(1.0, float(max(most, 2))),
        y_range=(0.0, 1.0),
    )
    return figure(title, legend([(one.name, one.style) for one in series]), chart)


def _chances(figures: Mapping[str, Any]) -> str:
    groups = figures["per_box"]
    rows = [
        [
            f'<span class="{group}">{group}</span>',
            f"{figures['boxes_of'][group]:,}",
            *(_times(shares[f"top{k}"], figures["chance"][f"top{k}"]) for k in TOPS),
        ]
        for group, shares in groups.items()
    ]
    head = ["group", "boxes", *(f"top-{k}" for k in TOPS)]
    text = note(f"Chance, in percent: {three(figures['chance'])}.")
    return figure("Times better than chance", table(head, rows, "names") + text)


def _times(share: float | None, chance: float) -> str:
    return DASH if share is None else f"{share / chance:.1f}\u00d7"


def _scatter(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [row for row in rows if row["boxes"] and row["train_images"] is not None]
    known.sort(key=lambda row: "fcr".find(row["frequency"] or "-"))
    marks = [
        Mark(
            max(float(row["train_images"]), 0.5),
            row["top1"],
            FREQUENCIES.get(row["frequency"], "plain"),
            f"{clean_name(row['name'])}: top-1 {percent(row['top1'])} % of {row['boxes']:,} boxes, "
            f"{row['train_images']:,} training images",
        )
        for row in known
    ]
    title = "Top-1 of each category against its training images (line: mean of neighbours)"
    axes = ("training images with the category (logarithmic)", "top-1, share of boxes")
    chart = scatter_chart(marks, trend(marks), title, axes)
    present = {mark.style for mark in marks}
    names = [(name, name) for name in FREQUENCIES.values() if name in present]
    text = note(
        "The teacher has not learnt from these annotations. Where the line stays level, it knows "
        "rare categories as well as frequent ones, which is what the student is to learn from it."
    )
    wide = f'<div class="wide">{chart}</div>' if chart else ""
    return figure(title, mark_legend(names), wide) + (text if chart else "")


def _extremes(rows: Sequence[Mapping[str, Any]]) -> str:
    seen = [row for row in rows if row["boxes"]]
    rare = [row for row in seen if row["frequency"] == "r"]
    kind = "rare categories" if rare else "categories"
    ordered = sorted(rare or seen, key=lambda row: (-row["top1"], row["name"]))
    best = min(_EXTREMES, -(-len(ordered) // 2))
    parts = [_listed(f"Best known {kind}", ordered[:best])]
    if len(ordered) > best:
        worst = ordered[max(best, len(ordered) - _EXTREMES) :]
        parts.append(_listed(f"Least known {kind}", worst[::-1]))
    return grid(*parts)


def _listed(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return figure(
        title, table(["category, most often taken for", "boxes", *_HEAD], _cells(rows), "names")
    )


_HEAD = [f"top-{k}" for k in TOPS]


def _cells(rows: Sequence[Mapping[str, Any]], *, train: bool = False) -> list[list[str]]:
    return [
        [
            _name(row),
            *([count(row["train_images"])] if train else []),
            count(row["boxes"]),
            *(percent(row[f"top{k}"]) for k in TOPS),
        ]
        for row in rows
    ]


def _name(row: Mapping[str, Any]) -> str:
    style = FREQUENCIES.get(row["frequency"], "plain")
    name = f'<span class="{style}">{breakable(row["name"])}</span>'
    if row["taken_for"] is None:
        return name
    wrong = f"{row['taken_for_boxes']:,} taken for {row['taken_for']}"
    return f'{name}<span class="detail">{breakable(wrong)}</span>'


def _all_categories(rows: Sequence[Mapping[str, Any]]) -> str:
    seen = [row for row in rows if row["boxes"]]
    head = ["category, most often taken for", "train images", "boxes", *_HEAD]
    body = table(head, _cells(seen, train=True), "names")
    absent = len(rows) - len(seen)
    words = f"All {len(seen):,} categories with boxes"
    if absent:
        words += f" ({absent:,} have none in these images)"
    return folded(words, body)
