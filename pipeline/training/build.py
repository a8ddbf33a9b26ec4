"""From a recipe to what trains: the student, and the teacher beside it."""

from pathlib import Path

import torch

from pipeline.data.vocabulary import Vocabulary
from pipeline.detectors import build_detector
from pipeline.errors import StorageError
from pipeline.recipe import Recipe
from pipeline.semantics.branch import SemanticBranch
from pipeline.semantics.teacher import Teacher, teacher_dir, trained_weights
from pipeline.semantics.text import text_embeddings
from pipeline.training.student import Student


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


def build_student(
    recipe: Recipe, vocabulary: Vocabulary, device: torch.device, *, pretrained: bool = True
) -> tuple[Student, Teacher | None]:
    """A student with its first weights, the same on every rank, and the frozen teacher.

    `pretrained=False` leaves the backbone's published weights out, for a checkpoint comes next.
    The teacher is None without a semantic section.
    """
    language = recipe.detector.class_head.kind == "language"
    weights = teacher_weights(recipe) if language or recipe.semantic else None
    embeddings = None
    if language or recipe.semantic:
        embeddings = text_embeddings(recipe.teacher, vocabulary.names, weights, cache_dir(recipe))
    torch.manual_seed(recipe.seed)
    detector = build_detector(
        recipe.detector,
        num_categories=vocabulary.num_categories,
        text_embeddings=embeddings if language else None,
        pretrained=pretrained,
    )
    detector.set_activation_checkpointing(recipe.training.activation_checkpointing)
    branch, teacher = None, None
    if recipe.semantic:
        assert embeddings is not None
        teacher = Teacher(recipe.teacher, embeddings, weights, device)
        branch = SemanticBranch(detector.feature_dim, embeddings, teacher.temperature)
    student = Student(detector, branch, recipe.semantic, recipe.training.precision)
    return student.to(device), teacher
