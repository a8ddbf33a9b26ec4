"""Resources and packages that must be there: CPUs, GPUs, Ray's object store, loggers."""

import os
from importlib.util import find_spec

from pipeline.check.describe import worst_canvas
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe


def check_machine(recipe: Recipe) -> None:
    """Raises `RecipeError` where this machine, if the run is to be on it, has less than asked."""
    _check_devices(recipe)
    _check_pool(recipe)
    _check_logging(recipe)


def _check_devices(recipe: Recipe) -> None:
    cluster, evaluation = recipe.cluster, recipe.evaluation
    if cluster.address is not None:
        return
    trainers = cluster.min_workers * cluster.cpus_per_worker
    spare = max(os.cpu_count() or 1, trainers) - trainers
    if evaluation.cpus > spare:
        raise RecipeError(
            f"recipe {recipe.name}: evaluation.cpus is {evaluation.cpus:g}, and the trainers leave "
            f"{spare:g} of this machine's; 0 shares those of the trainers"
        )
    if not cluster.gpus_per_worker and not evaluation.gpus:
        return
    import torch

    needed = cluster.gpus_per_worker * cluster.min_workers + evaluation.gpus
    if evaluation.gpus and needed > torch.cuda.device_count():
        raise RecipeError(
            f"recipe {recipe.name}: evaluation.gpus {evaluation.gpus:g} and the trainers' GPUs are "
            f"{needed:g}, and this machine has {torch.cuda.device_count()}; give the trainers "
            "less, or set evaluation.gpus to 0 to evaluate on the CPU while training"
        )
    if not torch.cuda.is_available():
        raise RecipeError(
            f"recipe {recipe.name}: cluster.gpus_per_worker is {cluster.gpus_per_worker:g}, and "
            "this machine has no GPU that torch can use; set cluster.gpus_per_worker=0 to train on "
            "the CPU, or cluster.address to a Ray cluster that has GPUs"
        )
    needed = cluster.gpus_per_worker * cluster.min_workers
    if needed > torch.cuda.device_count():
        raise RecipeError(
            f"recipe {recipe.name}: {cluster.min_workers} workers of "
            f"{cluster.gpus_per_worker:g} GPUs need {needed:g}, and this machine has "
            f"{torch.cuda.device_count()}"
        )


def _check_pool(recipe: Recipe) -> None:
    """What the actors of the teacher reserve must be there beside what the trainers have."""
    cluster, teacher = recipe.cluster, recipe.teacher
    used = recipe.uses_soft_labels and teacher.placement == "pool"
    if cluster.address is not None or not used:
        return
    trainers = cluster.min_workers * cluster.cpus_per_worker
    spare = max(os.cpu_count() or 1, trainers) - trainers
    if teacher.actors * teacher.cpus_per_actor > spare:
        raise RecipeError(
            f"recipe {recipe.name}: {teacher.actors} teacher.actors of {teacher.cpus_per_actor:g} "
            f"CPUs, and the trainers leave {spare:g} of this machine's; with "
            "teacher.cpus_per_actor=0 they share those of the trainers"
        )
    _check_object_store(recipe)
    if teacher.gpus_per_actor:
        import torch

        trainers = cluster.min_workers * cluster.gpus_per_worker
        spare = torch.cuda.device_count() - trainers
        if teacher.actors * teacher.gpus_per_actor > spare:
            raise RecipeError(
                f"recipe {recipe.name}: {teacher.actors} teacher.actors of "
                f"{teacher.gpus_per_actor:g} GPUs, and the trainers leave {spare:g} of this "
                "machine's; give both fractions of one (cluster.gpus_per_worker=0.7, "
                "teacher.gpus_per_actor=0.3), or set teacher.gpus_per_actor to 0"
            )


def _check_object_store(recipe: Recipe) -> None:
    """Pixels and masks that are with the teachers, or on their way, are in Ray's object store."""
    cluster, training = recipe.cluster, recipe.training
    height, width = worst_canvas(recipe, training.micro_batch)
    images = (recipe.teacher.batches_ahead + 1) * training.batch_size
    needed = images * 4 * height * width / 2**20
    if needed > cluster.object_store_megabytes:
        raise RecipeError(
            f"recipe {recipe.name}: the teachers' next {images} images of up to {height}x{width} "
            f"take {needed:.0f} MB, and cluster.object_store_megabytes is "
            f"{cluster.object_store_megabytes}; raise it, or lower teacher.batches_ahead"
        )


def _check_logging(recipe: Recipe) -> None:
    for package in ("wandb", "trackio"):
        if getattr(recipe.logging, package) is not None and find_spec(package) is None:
            raise RecipeError(
                f"recipe {recipe.name}: logging.{package} is set, and {package} is not installed; "
                f"`pip install {package}`, or set logging.{package} to null"
            )
