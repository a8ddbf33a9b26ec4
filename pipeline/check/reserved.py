"""What a run needs of a cluster beside each worker's GPU: other GPUs, CPUs, memory of hosts."""

from typing import NamedTuple

from pipeline.check.describe import worst_canvas
from pipeline.check.ranks import ModelSize
from pipeline.data.batch import batch_bytes
from pipeline.data.stream.workers import Ahead
from pipeline.detectors.memory import FLOAT32_BYTES as SINGLE
from pipeline.recipe import Recipe


class Reserved(NamedTuple):
    """GPUs or CPUs that are held as long as the run is."""

    trainers: float
    teachers: float
    evaluation: float

    @property
    def total(self) -> float:
        """What the cluster must have."""
        return self.trainers + self.teachers + self.evaluation


def reserved_gpus(recipe: Recipe, workers: int) -> Reserved:
    """GPUs of a run on so many workers."""
    cluster, teacher = recipe.cluster, recipe.teacher
    return Reserved(
        workers * cluster.gpus_per_worker,
        teacher.actors * teacher.gpus_per_actor if _has_pool(recipe) else 0,
        recipe.evaluation.gpus if _is_evaluated_live(recipe) else 0,
    )


def reserved_cpus(recipe: Recipe, workers: int) -> Reserved:
    """CPUs of a run on so many workers, as Ray counts them."""
    cluster, teacher = recipe.cluster, recipe.teacher
    return Reserved(
        workers * cluster.cpus_per_worker,
        teacher.actors * teacher.cpus_per_actor if _has_pool(recipe) else 0,
        recipe.evaluation.cpus if _is_evaluated_live(recipe) else 0,
    )


def _has_pool(recipe: Recipe) -> bool:
    return recipe.uses_soft_labels and recipe.teacher.placement == "pool"


def _is_evaluated_live(recipe: Recipe) -> bool:
    return recipe.data.validation is not None and recipe.evaluation.every > 0


def cluster_line(recipe: Recipe, workers: int) -> str:
    """What the cluster must have, and for whom."""
    gpus, cpus = reserved_gpus(recipe, workers), reserved_cpus(recipe, workers)
    parts = [f"{number:g} for {name}" for name, number in gpus._asdict().items() if number]
    text = f"{gpus.total:g} GPUs" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
    return f"  cluster     {text} and {cpus.total:g} CPUs, as long as the run lasts"


def read_ahead_bytes(recipe: Recipe, micro_steps: int) -> int:
    """Bytes of shared memory in which a worker's reader processes put batches, at most: the images
    and masks of worst canvases. Without such processes it is a few batches, and not counted."""
    data, micro_batch = recipe.data, recipe.training.micro_batch
    if not data.workers:
        return 0
    height, width = worst_canvas(recipe, micro_batch)
    held = recipe.teacher.batches_ahead * micro_steps if _has_pool(recipe) else 0
    ahead = Ahead(micro_steps, num_bytes=batch_bytes(micro_batch, height, width), held=held)
    return ahead.num_slabs(data.workers) * ahead.num_bytes


def checkpoint_bytes(size: ModelSize, *, averaged: bool) -> int:
    """Of weights, both moments and, where there are, averages."""
    return SINGLE * (size.parameters + (3 if averaged else 2) * size.trained) + size.buffers


def host_lines(recipe: Recipe, size: ModelSize, micro_steps: int) -> list[str]:
    """Memory of hosts that no column of the table has, for it is the same at each stage."""
    whole = checkpoint_bytes(size, averaged=recipe.training.ema_decay > 0)
    read = read_ahead_bytes(recipe, micro_steps)
    lines = [
        f"  host        a checkpoint is {whole / 1e9:.2f} GB, which the first worker holds in its "
        "host's memory while it saves"
    ]
    if read:
        lines.append(
            f"  readers     {recipe.data.workers} processes of each worker, with at most "
            f"{read / 1e9:.2f} GB of images in shared memory (/dev/shm)"
        )
    return lines
