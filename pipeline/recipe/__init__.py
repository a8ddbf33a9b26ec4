"""The recipe: the one complete, typed description of a stage.

Defaults are the paper's values (RichSem, supplement E; DINO 4-scale), so a recipe file states only
what makes it different. There is no inheritance, no include and no interpolation: what you read,
or what `longtail show` prints, is what runs.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, model_validator

from pipeline.recipe.data import (
    IMAGE_LEVEL_FORMATS,
    Data,
    ShardReading,
    Source,
    Transforms,
)
from pipeline.recipe.detector import Backbone, ClassHead, Denoising, DetectorSection, Losses
from pipeline.recipe.section import Section
from pipeline.recipe.teacher import Semantic, Teacher, TeacherTraining
from pipeline.recipe.training import Cluster, Evaluation, Logging, Training

__all__ = [
    "Backbone",
    "ClassHead",
    "Cluster",
    "Data",
    "Denoising",
    "DetectorSection",
    "Evaluation",
    "Logging",
    "Losses",
    "Recipe",
    "Section",
    "Semantic",
    "ShardReading",
    "Source",
    "Teacher",
    "TeacherTraining",
    "Training",
    "Transforms",
]


class Recipe(Section):
    """One stage. `initialize_from` names the recipe (or run) that the weights come from."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: str = "runs"
    initialize_from: str | None = None
    data: Data
    teacher: Teacher = Teacher()
    semantic: Semantic | None = Semantic()
    detector: DetectorSection = DetectorSection()
    training: Training
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _check(self) -> Self:
        training, cluster = self.training, self.cluster
        if isinstance(cluster.workers, int) and training.batch_size % cluster.workers:
            raise ValueError(
                f"training.batch_size {training.batch_size} does not divide among "
                f"cluster.workers {cluster.workers}; choose a multiple"
            )
        if training.batch_size < cluster.max_workers:
            raise ValueError(
                f"training.batch_size {training.batch_size} leaves some of cluster.workers "
                f"{cluster.workers} without an image; lower the most workers, or raise it"
            )
        if self.data.extra and self.data.extra_mode == "mixed" and training.batch_size < 2:
            raise ValueError("data.extra_mode mixed needs training.batch_size of at least 2")
        backbone = self.detector.backbone
        if backbone.norm == "frozen" and backbone.weights is None and not self.initialize_from:
            raise ValueError(
                "detector.backbone.norm frozen needs trained weights: random ones with frozen "
                "statistics cannot learn; set norm to group or own, or give weights"
            )
        if self.initialize_from == self.name:
            raise ValueError(f"initialize_from {self.name!r} is this recipe itself")
        self._check_semantic()
        for source in (*self.data.train, *self.data.extra):
            self._check_learned(source)
        return self

    def _check_semantic(self) -> None:
        semantic, teacher = self.semantic, self.teacher
        if semantic is None:
            return
        if semantic.columns == "federated" and not self.detector.losses.federated_categories:
            raise ValueError(
                "semantic.columns federated needs the columns of a federated class loss, and "
                "detector.losses.federated_categories is 0; set it to 50, or columns to all"
            )
        elsewhere = teacher.placement == "pool" or teacher.stored or teacher.top_k is not None
        if semantic.objective == "features" and elsewhere:
            raise ValueError(
                "semantic.objective features learns embeddings, which only a teacher in the "
                "training process gives: leave out teacher.placement, teacher.stored and "
                "teacher.top_k, or choose objective logits"
            )

    def _check_learned(self, source: Source) -> None:
        """Something must be learned from a source, and what is asked of its labels be there."""
        where, image_level = f"source {source.name}", self.detector.losses.image_level
        terms = self.terms_of(source)
        if image_level != "boxes" and source.format in IMAGE_LEVEL_FORMATS and "class" not in terms:
            raise ValueError(
                f"{where}: detector.losses.image_level {image_level} (Detic) learns the labels of "
                "whole images, and this source gives none; set its use_labels and use_class to "
                "true (captions need files.classes too), leave it out, or choose image_level boxes"
            )
        if not terms:
            raise ValueError(
                f"{where}: nothing is learned from it: its labels are not used, use_box is false, "
                "and there is no semantic branch for it (semantic, use_semantic; with "
                "semantic.labels hard it needs labels); switch one on, or leave the source out"
            )

    def terms_of(self, source: Source) -> list[str]:
        """Which terms of the loss the images of a train or extra source have."""
        labels = source.has_labels and source.use_class
        semantic = source.use_semantic and self.semantic is not None
        if self.semantic is not None and self.semantic.labels == "hard":
            semantic = semantic and labels
        has = {"class": labels, "box": source.use_box, "semantic": semantic}
        return [term for term, is_there in has.items() if is_there]

    def terms_left_out(self, source: Source) -> str:
        """Which of the recipe's terms they lack, in words; empty where they have them all."""
        all_terms = ("class", "box", *(("semantic",) if self.semantic else ()))
        absent = [term for term in all_terms if term not in self.terms_of(source)]
        if not absent:
            return ""
        why = ""
        if "semantic" in absent and source.use_semantic:
            why = ", for semantic.labels hard learns labels and it gives none"
        return f"no {' or '.join(absent)} term{why}"

    @property
    def uses_soft_labels(self) -> bool:
        """Whether training asks a teacher, which hard labels do without."""
        return self.semantic is not None and self.semantic.labels == "soft"

    @property
    def run_dir(self) -> Path:
        """Where this stage keeps everything that it makes."""
        return Path(self.output) / self.name

    def hash(self) -> str:
        """Sixteen hex digits over the complete resolved recipe."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The complete resolved recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)
