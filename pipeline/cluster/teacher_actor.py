"""Ray actors that hold the frozen teacher (free of torch until an actor works)."""

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from pipeline.recipe import Recipe, Teacher

if TYPE_CHECKING:
    from pipeline.semantics.soft_labels import LabelMaker, PackedBatch
    from pipeline.semantics.sparse import SparseLabels

MakeTeacher = Callable[[], "LabelMaker"]


class TeacherActor:
    """Soft labels of the batches that it is sent, one after the other, by what `make` gives.

    It keeps nothing of a batch, so one that is begun anew is as good as before. The teacher is
    loaded by the first call and not by the constructor: what is wrong then comes as its error.
    """

    def __init__(self, make: MakeTeacher, top_k: int | None, threads: int, directory: str) -> None:
        os.chdir(directory)
        # Set before torch is imported, which reads it once.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._make, self._top_k, self._threads = make, top_k, threads
        self._teacher: LabelMaker | None = None

    def load(self) -> float:
        """Load the teacher where that is not done; its temperature."""
        return self._loaded().temperature

    def labels(self, packed: "PackedBatch") -> "SparseLabels":
        """Rows of all boxes of a batch, in their order."""
        import torch

        from pipeline.semantics.sparse import SparseLabels

        teacher = self._loaded()
        batch = packed.batch().to(_device())
        return SparseLabels.of(torch.cat(teacher.soft_labels(batch)), self._top_k)

    @ray.method(concurrency_group="life")
    def pid(self) -> int:
        """Its process; answered while a batch is under way too, so that an answer says it lives."""
        return os.getpid()

    def _loaded(self) -> "LabelMaker":
        if self._teacher is None:
            import torch

            torch.set_num_threads(self._threads)
            self._teacher = self._make()
        return self._teacher


def start_actors(section: Teacher, make: MakeTeacher) -> list[Any]:
    """The pool's actors; Ray begins one anew, elsewhere if need be, whenever its process dies."""
    threads = max(1, int(section.cpus_per_actor))
    remote = ray.remote(
        num_cpus=section.cpus_per_actor,
        num_gpus=section.gpus_per_actor,
        max_restarts=-1,
        max_task_retries=0,  # The pool sends work again, to any of them.
        concurrency_groups={"life": 1},
    )(TeacherActor)
    return [remote.remote(make, section.top_k, threads, os.getcwd()) for _ in range(section.actors)]


def recipe_actors(recipe: Recipe) -> list[Any]:
    """The actors that a recipe asks for; none where its teacher is in the training process."""
    if not recipe.uses_soft_labels or recipe.teacher.placement != "pool":
        return []
    return start_actors(recipe.teacher, partial(_make_teacher, recipe.model_dump_json()))


def _make_teacher(recipe_json: str) -> "LabelMaker":
    from pipeline.data.shards.preparing import load_index, shards_url
    from pipeline.training.build import build_teacher

    recipe = Recipe.model_validate_json(recipe_json)
    index = load_index(shards_url(recipe.data, recipe.data.vocabulary_source))
    return build_teacher(recipe, index.vocabulary, _device())


def _device() -> str:
    """Ray shows an actor the GPU that it may use, or none."""
    return "cuda" if ray.get_gpu_ids() else "cpu"
