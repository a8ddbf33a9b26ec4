"""Which device a worker computes on."""

import os

import torch

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe


def worker_device(recipe: Recipe) -> torch.device:
    """This worker's GPU, or the CPU where the recipe asks for none; `RecipeError` without one."""
    if recipe.cluster.gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RecipeError(
            f"cluster.gpus_per_worker is {recipe.cluster.gpus_per_worker:g} and torch finds no GPU "
            "here; set it to 0 to use the CPU"
        )
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
