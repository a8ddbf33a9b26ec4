"""`longtail study teacher-zero-shot`: does the teacher know what is in ground-truth boxes?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.vocabulary.categories import Category
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.study.output import Outcome
from pipeline.study.teacher_ranks import (
    TOPS,
    Classified,
    classify,
    top,
    top_of_categories,
    validation_source,
)
from pipeline.study.zero_shot_page import describe_labels, describe_teacher, render, three

NAME = "teacher-zero-shot"
PUBLISHED: dict[str, dict[int, float]] = {
    "all": {1: 0.162, 5: 0.296, 10: 0.339},
    "rare": {1: 0.167, 5: 0.299, 10: 0.331},
    "common": {1: 0.164, 5: 0.293, 10: 0.337},
    "frequent": {1: 0.157, 5: 0.298, 10: 0.346},
}
"""RichSem's supplement, Table 2: CLIP RN50 on the ground-truth boxes of LVIS v1 val. Its head calls
them AP; whether it averages over boxes or over categories is not stated."""


def zero_shot(
    recipe: Recipe, *, device: torch.device, seed: int = 0, images: int | None = None
) -> Outcome:
    """Classify the ground-truth boxes of the validation source with the recipe's teacher.

    Shards and teacher must be there. Raises as `classify` does.
    """
    source = validation_source(recipe)
    with Progress(f"classifying the boxes of {source.name}", "images") as progress:
        found = classify(
            recipe, (0.0,), seed=seed, images=images, device=device, progress=progress.update
        )
    rows = _category_rows(found)
    figures = _figures(found)
    lines = [f"top-1/5/10 of {len(found.ranks[0]):,} boxes in percent, by the teacher of "
             f"{recipe.name} ({describe_teacher(recipe)})"]  # fmt: skip
    for group, shares in figures["per_box"].items():
        published = figures["published"].get(group)
        known = f"   published {three(published)}" if published else ""
        lines.append(f"  {group:<9} {three(shares)}{known}")
    lines.append(describe_labels(figures))
    return Outcome(f"{NAME}_{recipe.name}", render(found, rows, figures), rows, figures, lines)


def is_lvis(categories: Sequence[Category]) -> bool:
    """Whether these are the 1203 categories of LVIS v1."""
    ends = (categories[0].name, categories[-1].name) if categories else ()
    return len(categories) == 1203 and ends == ("aerosol_can", "zucchini")


def _figures(found: Classified) -> dict[str, Any]:
    recipe, ranks = found.recipe, found.ranks[0]
    size = len(found.categories)
    published = PUBLISHED if is_lvis(found.categories) else {}

    def named(shares: Mapping[int, float | None]) -> dict[str, float | None]:
        return {f"top{k}": shares[k] for k in TOPS}

    return {
        "study": NAME,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash(),
        "teacher": recipe.teacher.model_dump(mode="json"),
        "source": validation_source(recipe).name,
        "images": found.images,
        "all_images": found.all_images,
        "boxes": len(ranks),
        "boxes_without_label": found.unlabelled,
        "temperature": found.temperature,
        "categories_of_a_soft_label": float(np.exp(ranks.entropy).mean()),
        "closest_names": [found.categories[column].name for column in found.closest[:2]],
        "closest_cosine": found.closest[2],
        "categories": size,
        "per_box": {
            group: named({k: top(ranks.rank[columns[ranks.column]], k) for k in TOPS})
            for group, columns in found.groups.items()
        },
        "per_category": {
            group: named({k: top_of_categories(ranks, columns, k) for k in TOPS})
            for group, columns in found.groups.items()
        },
        "boxes_of": {
            group: int(columns[ranks.column].sum()) for group, columns in found.groups.items()
        },
        "chance": named({k: min(k / size, 1.0) for k in TOPS}),
        "published": {group: named(shares) for group, shares in published.items()},
    }


def _category_rows(found: Classified) -> list[dict[str, Any]]:
    """One row a category: shares of its boxes, and what they are taken for most often."""
    ranks = found.ranks[0]
    order = np.argsort(ranks.column, kind="stable")
    bounds = np.searchsorted(ranks.column[order], np.arange(len(found.categories) + 1))
    rows = []
    for column, category in enumerate(found.categories):
        own = order[bounds[column] : bounds[column + 1]]
        wrong = Counter(ranks.first[own][ranks.first[own] != column].tolist()).most_common(1)
        rows.append(
            {
                "category_id": category.id,
                "name": category.name,
                "frequency": category.frequency,
                "train_images": category.image_count,
                "boxes": len(own),
                **{f"top{k}": top(ranks.rank[own], k) for k in TOPS},
                "taken_for": found.categories[wrong[0][0]].name if wrong else None,
                "taken_for_boxes": wrong[0][1] if wrong else 0,
            }
        )
    return rows
