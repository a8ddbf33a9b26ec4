"""At which place the teacher ranks the category of each ground-truth box."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert

from pipeline.data.batch import Batch, Targets
from pipeline.data.plan.draws import permutation
from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.preparing import shards_url
from pipeline.data.stream.batches import EvaluationSet
from pipeline.data.vocabulary.categories import Category
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Recipe, Source
from pipeline.report.categories import FREQUENCIES
from pipeline.study.jitter import jittered
from pipeline.training.build import build_teacher

TOPS = (1, 5, 10)
_BOXES_AT_ONCE = 2000
"""More boxes than these of a batch are looked at in turns, level by level: a region of RN50 takes
0.4 MB before its attention pool."""


class SoftLabeller(Protocol):
    """What a study needs of a teacher."""

    def soft_labels(self, batch: Batch) -> list[Tensor]:
        """(N_i, C) distributions over the categories for the boxes of each image."""
        ...


@dataclass(frozen=True)
class BoxRanks:
    """One row a labelled box, in the order of the images.

    `column` (N,) is its category, `rank` (N,) how many categories the teacher holds for no less
    likely (0: it is the first; a tie counts against the teacher), `first` (N,) the category that
    the teacher holds for most likely, `overlap` (N,) the IoU of the box that the teacher saw with
    the true one, `entropy` (N,) that of its soft label in nats.
    """

    column: NDArray[np.int64]
    rank: NDArray[np.int64]
    first: NDArray[np.int64]
    overlap: NDArray[np.float64]
    entropy: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.column)


@dataclass(frozen=True)
class Classified:
    """Boxes of the validation source under a teacher, once for each level of noise."""

    recipe: Recipe
    categories: tuple[Category, ...]
    levels: tuple[float, ...]
    ranks: tuple[BoxRanks, ...]
    images: int
    all_images: int
    unlabelled: int
    """Boxes without a label, which are left out."""
    temperature: float
    """What the teacher multiplies cosines by."""
    closest: tuple[int, int, float]
    """The two columns whose names the teacher can tell apart least, and their cosine."""

    @property
    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Which columns belong to each group: all, then those that the data set states."""
        stated = [category.frequency for category in self.categories]
        every = {"all": np.ones(len(stated), bool)}
        return every | {
            name: np.array([group == letter for group in stated], bool)
            for letter, name in FREQUENCIES.items()
            if letter in stated
        }


def validation_source(recipe: Recipe) -> Source:
    """The source whose boxes are classified; raises `RecipeError` without it or without a teacher.

    A stage whose class head learns no text and that has no semantic branch uses no teacher.
    """
    if recipe.semantic is None and recipe.detector.class_head.kind != "language":
        raise RecipeError(
            f"recipe {recipe.name} has no teacher: `semantic` is null and detector.class_head.kind "
            f"is {recipe.detector.class_head.kind}; name a recipe with a semantic branch, or "
            "override semantic={}"
        )
    if recipe.data.validation is None:
        raise RecipeError(
            f"recipe {recipe.name} has no data.validation, whose boxes the teacher would classify; "
            "add the source"
        )
    return recipe.data.validation


def classify(
    recipe: Recipe,
    levels: Sequence[float],
    *,
    seed: int,
    images: int | None,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Classified:
    """Show the validation boxes to the recipe's teacher at every level of noise.

    With `images`, so many of them that the seed draws. The columns are the categories of the
    validation source itself. Raises `DataError` where no box has a label.
    """
    source = validation_source(recipe)
    index = load_index(shards_url(recipe.data, source))
    chosen = _drawn_images(index, images, seed)
    vocabulary = index.vocabulary
    evaluation = EvaluationSet(recipe.data, index, vocabulary, chosen)
    teacher = build_teacher(recipe, vocabulary, device)
    parts: list[list[BoxRanks]] = [[] for _ in levels]
    done = unlabelled = 0
    for batch in evaluation.iterate(recipe.evaluation.batch_size):
        unlabelled += sum(int((target.labels < 0).sum()) for target in batch.targets)
        for part, ranks in zip(
            parts, rank_boxes(teacher, batch, levels, seed, device), strict=True
        ):
            part.append(ranks)
        done += len(batch.targets)
        progress(done, evaluation.num_images)
    found = tuple(_joined(part) for part in parts)
    if not len(found[0]):
        raise DataError(
            f"no box of source {source.name} has a label in {done:,} images; there is nothing to "
            "classify: look at it with `longtail inspect`"
        )
    categories = vocabulary.categories
    return Classified(
        recipe,
        categories,
        tuple(levels),
        found,
        done,
        index.num_samples,
        unlabelled,
        teacher.temperature,
        teacher.closest_names(),
    )


def rank_boxes(
    teacher: SoftLabeller,
    batch: Batch,
    levels: Sequence[float],
    seed: int,
    device: torch.device | str = "cpu",
) -> list[BoxRanks]:
    """The ranks of a batch's labelled boxes at each level, a level an entry.

    The teacher's trunk runs once for as many levels as `_BOXES_AT_ONCE` allows.
    """
    labelled = [_only_labelled(target) for target in batch.targets]
    boxes = sum(len(target.boxes) for target in labelled)
    together = max(1, _BOXES_AT_ONCE // max(boxes, 1))
    found: list[BoxRanks] = []
    for start in range(0, len(levels), together):
        some = levels[start : start + together]
        moved = [[jittered(target, level, seed) for level in some] for target in labelled]
        shown = [
            replace(target, boxes=torch.cat(each), labels=target.labels.repeat(len(some)))
            for target, each in zip(labelled, moved, strict=True)
        ]
        soft = teacher.soft_labels(replace(batch, targets=shown).to(device))
        by_image = [
            _ranks(target, label.cpu(), each)
            for target, label, each in zip(labelled, soft, moved, strict=True)
        ]
        found += [_joined(parts) for parts in zip(*by_image, strict=True)]
    return found


def top(ranks: NDArray[np.int64], k: int) -> float | None:
    """The share of ranks below `k`, or None of no box."""
    return float((ranks < k).mean()) if len(ranks) else None


def top_of_categories(found: BoxRanks, columns: NDArray[np.bool_], k: int) -> float | None:
    """The mean over those of `columns` that have boxes of each one's own share below `k`."""
    total = np.bincount(found.column, minlength=len(columns))
    right = np.bincount(found.column[found.rank < k], minlength=len(columns))
    seen = columns & (total > 0)
    return float((right[seen] / total[seen]).mean()) if seen.any() else None


def check_images(images: int | None) -> None:
    """Raises `RecipeError` where no image is asked for."""
    if images is not None and images < 1:
        raise RecipeError(f"--images is {images}; give a number of images from 1 on")


def _drawn_images(index: Index, images: int | None, seed: int) -> NDArray[np.int64] | None:
    check_images(images)
    if images is None:
        return None
    return index.image_id[permutation(index.num_samples, seed, "images")[:images]]


def _only_labelled(target: Targets) -> Targets:
    known = target.labels >= 0
    return replace(target, boxes=target.boxes[known], labels=target.labels[known])


def _ranks(target: Targets, soft: Tensor, moved: Sequence[Tensor]) -> Iterator[BoxRanks]:
    """For each level, out of an image's rows of all levels one after another."""
    rows = soft.split(len(target.boxes))
    if not len(target.boxes):
        rows = (soft,) * len(moved)
    for row, boxes in zip(rows, moved, strict=True):
        own = row.gather(1, target.labels[:, None])
        rank = (~(row < own)).sum(dim=1) - 1  # What is not a number counts against it too.
        yield BoxRanks(
            target.labels.numpy(),
            rank.numpy(),
            row.argmax(dim=1).numpy(),
            _iou(target, boxes),
            torch.special.entr(row.double()).sum(dim=1).numpy(),
        )


def _iou(target: Targets, boxes: Tensor) -> NDArray[np.float64]:
    a, b = (box_convert(each.double(), "cxcywh", "xyxy") for each in (target.boxes, boxes))
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = [(each[:, 2:] - each[:, :2]).prod(dim=1) for each in (a, b)]
    return (shared / (areas[0] + areas[1] - shared)).numpy()


def _joined(parts: Iterable[BoxRanks]) -> BoxRanks:
    each = zip(*((p.column, p.rank, p.first, p.overlap, p.entropy) for p in parts), strict=True)
    return BoxRanks(*(np.concatenate(column) for column in each))
