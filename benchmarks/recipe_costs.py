"""What the recipes of the published experiments cost, counted and not measured.

    python benchmarks/recipe_costs.py [NAME ...]        # of recipes/, all that take /datasets

Memory is what `longtail check` predicts for a GPU at worst, by the recipe's own workers and layout.
Operations are those of convolutions and matrix products in the forward and backward pass of a step,
counted on tensors without memory (`torch.utils.flop_counter`), with the frozen teacher's; DINO R50
on photographs is 1. Hours follow from DINO's published 4.5 images a second on an A100, as if all
operations took as long as its own: an estimate, for no recipe has run on such a machine.

Photographs are of 640 x 480 pixels, three quarters of them wide, and are drawn with the recipe's
transforms; a mosaic always fills its canvas. An image has 13 boxes, one where they are coarse.
"""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.check.activations import MicroBatch, meta_student, step_bytes
from pipeline.check.prediction import PUBLISHED, layout_of, predicted_memory
from pipeline.check.teacher import teacher_bytes
from pipeline.data.plan.geometry import canvas_divisor, train_view
from pipeline.recipe import Recipe
from pipeline.recipe.data import IMAGE_LEVEL_FORMATS
from pipeline.recipe_file import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SPEED = 4.5
"""Images a second of DINO's R50 on one A100, by its authors."""
VISUAL_GENOME = 1594
"""Categories of at least 30 boxes by VinVL's count, for the data set is not here to be counted."""
PHOTOGRAPHS = ((480, 640), (480, 640), (480, 640), (640, 480))
BOXES, DRAWS = 13, 4000


class Cost(NamedTuple):
    """GB on each of the recipe's GPUs at worst, operations of an image as multiples of DINO R50's,
    and hours on as many A100."""

    gigabytes: float
    operations: float
    gpus: int
    hours: float


def cost_of(recipe: Recipe) -> Cost:
    """Count one recipe's."""
    memory, _ = predicted_memory(recipe, recipe.cluster.max_workers, categories_of(recipe))
    gpus, images = recipe.cluster.max_workers, recipe.training.steps * recipe.training.batch_size
    operations = operations_of(recipe) / baseline()
    hours = images * operations / (SPEED * gpus) / 3600
    return Cost(memory[layout_of(recipe)].total / 1e9, operations, gpus, hours)


def categories_of(recipe: Recipe) -> int:
    return PUBLISHED.get(recipe.data.vocabulary_source.format, VISUAL_GENOME)


@cache
def baseline() -> float:
    """Operations of an image of DINO R50, as published: photographs with boxes."""
    return operations_of(read_recipe("dino_r50"))


def operations_of(recipe: Recipe) -> float:
    """Of the mean image, over streams in the ratio of their steps or samples."""
    boxed = of_micro_batch(recipe, photographs(recipe), BOXES)
    if not recipe.data.extra:
        return boxed
    coarse = all(source.format in IMAGE_LEVEL_FORMATS for source in recipe.data.extra)
    pixels, boxes = photographs(recipe), 1 if coarse else BOXES
    if recipe.data.transforms.mosaic:
        pixels, boxes = float((2 * recipe.data.transforms.mosaic_cell) ** 2), 4 * boxes
    extra = of_micro_batch(recipe, pixels, boxes)
    ratio = recipe.data.extra_ratio
    return (boxed + ratio * extra) / (1 + ratio)


def photographs(recipe: Recipe) -> float:
    """Mean pixels of a canvas that a micro-batch of photographs is padded to."""
    rng, transforms = np.random.default_rng(0), recipe.data.transforms
    divisor, pixels = canvas_divisor(transforms), []
    for _ in range(DRAWS):
        sizes = [
            train_view(PHOTOGRAPHS[rng.integers(len(PHOTOGRAPHS))], transforms, rng).size
            for _ in range(images_of(recipe))
        ]
        height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*sizes, strict=True))
        pixels.append(height * width)
    return float(np.mean(pixels))


def images_of(recipe: Recipe) -> int:
    """Images of a micro-batch."""
    share = -(-recipe.training.batch_size // recipe.cluster.max_workers)
    return min(share, recipe.training.micro_batch)


def of_micro_batch(recipe: Recipe, pixels: float, boxes: int) -> float:
    """Operations of an image of so many pixels: but for rounding of maps a line, drawn through a
    smaller and a larger canvas."""
    sides = (640, 1280)
    counts = [of_canvas(recipe, side, boxes) for side in sides]
    slope = (counts[1] - counts[0]) / (sides[1] ** 2 - sides[0] ** 2)
    return (counts[0] + slope * (pixels - sides[0] ** 2)) / images_of(recipe)


def of_canvas(recipe: Recipe, side: int, boxes: int) -> float:
    """Operations of a micro-batch on square canvases."""
    categories, drawn = categories_of(recipe), recipe.detector.losses.federated_categories
    columns = min(categories, drawn + recipe.training.batch_size * boxes) if drawn else categories
    batch = MicroBatch(images_of(recipe), side, side, boxes, columns)
    student = meta_student(recipe, categories)
    return counted(lambda: step_bytes(student, batch, on_gpu=True)) + counted(
        lambda: teacher_bytes(recipe, batch)
    )


def counted(function: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def read_recipe(name: str) -> Recipe:
    """A published experiment's, with a backbone whose weights need not be here."""
    return load_recipe(RECIPES / f"{name}.yaml", ["detector.backbone.weights=pretrained"])


def main() -> None:
    published = sorted(
        path.stem for path in RECIPES.glob("*.yaml") if "root: /datasets" in path.read_text()
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="NAME", default=published)
    torch.set_num_threads(1)
    print(f"{'':28}{'GB a GPU':>10}{'operations':>12}{'GPUs':>6}{'hours':>10}", flush=True)
    for name in parser.parse_args().recipes:
        cost = cost_of(read_recipe(name))
        print(
            f"{name:28}{cost.gigabytes:10.1f}{cost.operations:12.2f}{cost.gpus:6}{cost.hours:10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
