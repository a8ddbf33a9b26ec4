"""From a recipe to what trains: the student, and the soft labels that it learns."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.shards.index import Index
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.detectors import build_detector
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Recipe
from pipeline.semantics.branch import SemanticBranch
from pipeline.semantics.embeddings import EmbeddingsInProcess
from pipeline.semantics.soft_labels import InProcess, SoftLabels
from pipeline.semantics.stored import StoredLabels, StoredSource, labels_identity, labels_url
from pipeline.semantics.teacher import Teacher, teacher_dir, trained_weights
from pipeline.semantics.text import text_embeddings
from pipeline.training.student import Student
from pipeline.training.whereabouts import here


def cache_dir(recipe: Recipe) -> Path:
    """Where trained teachers and text embeddings are kept, by content, for all runs together."""
    return Path(recipe.output) / "cache"


def teacher_weights(recipe: Recipe) -> Path | None:
    """The teacher's weights file where the recipe trains one, else None.

    Raises `StorageError` when it has not been trained yet.
    """
    if recipe.teacher.train is None:
        return None
    directory = teacher_dir(recipe.teacher, recipe.data, cache_dir(recipe))
    weights = trained_weights(directory)
    if weights is None:
        raise StorageError(f"no trained teacher at {directory}; run `longtail prepare` first")
    return weights


def build_teacher(recipe: Recipe, vocabulary: Vocabulary, device: torch.device | str) -> Teacher:
    """The frozen teacher of a recipe; raises `StorageError` when it has not been trained yet."""
    weights = teacher_weights(recipe)
    embeddings = _embeddings(recipe, vocabulary, weights)
    return Teacher(recipe.teacher, embeddings, weights, device)


def _embeddings(recipe: Recipe, vocabulary: Vocabulary, weights: Path | None) -> Tensor:
    """Made here where `longtail prepare` has not: one batch of names after the other."""
    return text_embeddings(
        recipe.teacher,
        vocabulary.names,
        weights,
        cache_dir(recipe),
        progress=lambda _done, _total: here.move(),
    )


def labels_in_process(
    recipe: Recipe, vocabulary: Vocabulary, device: torch.device | str
) -> SoftLabels:
    """Soft labels made in this process, or read from files; raises `RecipeError` where the recipe
    wants a pool."""
    if recipe.teacher.placement == "pool":
        raise RecipeError(
            f"recipe {recipe.name}: teacher.placement is pool, whose actors only Ray can start; "
            "use `longtail train` or `longtail run` without torchrun, or set "
            "teacher.placement=in_process"
        )
    if recipe.teacher.stored:
        return stored_labels(recipe, vocabulary)
    teacher = build_teacher(recipe, vocabulary, device)
    if recipe.semantic is not None and recipe.semantic.objective == "features":
        return EmbeddingsInProcess(teacher)
    return InProcess(teacher, recipe.teacher.top_k)


def stored_labels(recipe: Recipe, vocabulary: Vocabulary) -> StoredLabels:
    """Soft labels of every source that the branch learns from, from their files.

    Raises `StorageError` where those of this teacher, vocabulary and size have not been made.
    """
    return StoredLabels(
        {
            name: StoredSource(index, labels_folder(recipe, vocabulary, index)[0])
            for name, index in labelled_sources(recipe).items()
        }
    )


def labelled_sources(recipe: Recipe) -> dict[str, Index]:
    """The indexes of the sources whose boxes have soft labels, by name; `RecipeError` for none."""
    used = [s for s in (*recipe.data.train, *recipe.data.extra) if s.use_semantic]
    if not used:
        raise RecipeError(
            f"recipe {recipe.name}: no source has use_semantic, so the branch would learn no soft "
            "label; set it to true for one, or semantic to null"
        )
    return {source.name: load_index(shards_url(recipe.data, source)) for source in used}


def labels_folder(
    recipe: Recipe, vocabulary: Vocabulary, index: Index
) -> tuple[str, dict[str, Any]]:
    """Where the stored soft labels of a source are, and what they follow from."""
    identity = labels_identity(
        recipe.teacher,
        teacher_weights(recipe),
        vocabulary.names,
        recipe.data.transforms,
        index,
    )
    return labels_url(index, identity), identity


def build_student(
    recipe: Recipe,
    vocabulary: Vocabulary,
    device: torch.device,
    *,
    pretrained: bool = True,
    soft_labels: SoftLabels | None = None,
) -> tuple[Student, SoftLabels | None]:
    """A student with its first weights, the same on every rank, and the source of soft labels.

    `pretrained=False` leaves the backbone's published weights out, for a checkpoint comes next.
    `soft_labels` are those of a pool; else a teacher is made here. None without a semantic section,
    and where its branch learns hard labels.
    """
    language = recipe.detector.class_head.kind == "language"
    embeddings = None
    if language or recipe.semantic:
        here.enter("text embeddings")
        weights = teacher_weights(recipe)
        embeddings = _embeddings(recipe, vocabulary, weights)
    temperature = 0.0
    if recipe.semantic:
        here.enter("loading the teacher")
        if not recipe.uses_soft_labels:
            temperature = build_teacher(recipe, vocabulary, "cpu").temperature
        else:
            soft_labels = soft_labels or labels_in_process(recipe, vocabulary, device)
            temperature = soft_labels.temperature
    # After the teacher, which draws too: the first weights do not depend on where it is.
    torch.manual_seed(recipe.seed)
    here.enter("building the detector")
    detector = build_detector(
        recipe.detector,
        num_categories=vocabulary.num_categories,
        text_embeddings=embeddings if language else None,
        pretrained=pretrained,
    )
    detector.set_activation_checkpointing(recipe.training.activation_checkpointing)
    branch = None
    if recipe.semantic:
        assert embeddings is not None
        branch = SemanticBranch(detector.feature_dim, embeddings, temperature, recipe.semantic)
    student = Student(detector, branch, recipe.semantic, recipe.training.precision)
    return student.to(device), soft_labels if recipe.uses_soft_labels else None
