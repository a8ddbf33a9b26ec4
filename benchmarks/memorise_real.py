"""Memorise the nine real LVIS photographs (100 boxes), and report AP on those same photographs.

    python benchmarks/memorise_real.py --data ../shared/data

A detector whose losses, box conventions and evaluator are right can learn a handful of photographs
by heart; one with a flipped axis or a wrong box convention cannot. The number says nothing about
unseen photographs. Runs in one process on the CPU, and prints the table and the time it took.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from pipeline.data.shards.preparing import prepare_source
from pipeline.evaluation.checkpoints import evaluate_newest
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_from_tree
from pipeline.training.loop import train_here

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def memorising_recipe(data: Path, output: Path, steps: int) -> Recipe:
    """A small DINO from scratch: no augmentation but the flip, no image-level data, no teacher."""
    source = {
        "format": "lvis",
        "images": "lvis",
        "annotations": "derived/lvis_val_9_as_v1_categories.json",
    }
    tree = {
        "name": "memorise_real",
        "output": str(output),
        "data": {
            "root": str(data.resolve()),
            "shards": str(output / "shards"),
            "train": [{"name": "photographs", **source}],
            "validation": {"name": "photographs_again", **source},
            "repeat_threshold": 0.0,
            "workers": 0,
            "transforms": {
                "short_sides": [256],
                "max_side": 384,
                "crop_probability": 0.0,
                "evaluation_short_side": 256,
                "evaluation_max_side": 384,
            },
        },
        "semantic": None,
        "detector": {
            "backbone": {
                "name": "resnet18",
                "weights": None,
                "norm": "group",
                "frozen_stages": 0,
                "arguments": {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]},
            },
            "hidden_dim": 128,
            "num_heads": 4,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "ffn_dim": 256,
            "num_queries": 100,
            "class_head": {"kind": "linear"},
            "denoising": {"num_queries": 100},
            "losses": {"federated_categories": 0},
        },
        "training": {
            "steps": steps,
            "batch_size": 3,
            "micro_batch": 3,
            "learning_rate": 5e-4,
            "backbone_learning_rate": 5e-4,
            "clip_norm": 1.0,
            "warmup_steps": 20,
            "schedule": "cosine",
            "zero_stage": 0,
            "checkpoint_every": steps,
            "log_every": 25,
        },
        "cluster": {"workers": 1, "gpus_per_worker": 0},
    }
    return recipe_from_tree(tree, "memorising recipe")


def in_line(
    function: Callable[[Argument], Result], arguments: Sequence[Argument], /
) -> Iterator[tuple[int, Result]]:
    """Shard tasks without a cluster."""
    yield from ((i, function(argument)) for i, argument in enumerate(arguments))


def main() -> None:
    """Prepare, train, evaluate on the training photographs, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the real sample data")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, help="keep the run here (default: removed)")
    arguments = parser.parse_args()
    output = arguments.output or Path(tempfile.mkdtemp(prefix="memorise_real_"))
    recipe = memorising_recipe(arguments.data, output, arguments.steps)
    try:
        for source in recipe.data.sources:
            prepare_source(source, recipe.data, in_line)
        started = time.monotonic()
        train_here(recipe)
        seconds = time.monotonic() - started
        print(evaluate_newest(recipe, official=True))
        print(
            f"trained {recipe.training.steps} steps of {recipe.training.batch_size} photographs in "
            f"{seconds:.0f} s on {torch.get_num_threads()} threads"
        )
    finally:
        if arguments.output is None:
            shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
