"""Recipe sections on the teacher and the semantic branch."""

from typing import Literal, Self

from pydantic import model_validator

from pipeline.recipe.data import Source
from pipeline.recipe.section import Count, NonNegative, Positive, PositiveCount, Section


class TeacherTraining(Section):
    """A small CLIP trained from scratch on captions, where no published weights fit."""

    captions: Source
    steps: PositiveCount = 400
    batch_size: PositiveCount = 128
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 0.1
    warmup_steps: Count = 40


class Teacher(Section):
    """The frozen CLIP that gives text embeddings and soft labels (supplement E.1: RN50)."""

    model: str = "RN50"
    """An open_clip model name, or `miniature-rn`, the small model config that this package has."""
    pretrained: str | None = "openai"
    """An open_clip tag or a local weights file; null only together with `train`."""
    train: TeacherTraining | None = None
    prompts: Literal["single", "seven", "ensemble"] = "ensemble"
    text_embeddings: str | None = None
    """Ready-made ones instead of `prompts`: .npy, or .safetensors with the key `text_embeddings`;
    a row for each category, in the order of their ids."""
    regions: Literal["auto", "dense", "crops"] = "auto"
    """Boxes are read from one map of the image, or each as an image of its own (docs/teacher.md);
    auto takes what the tower was trained for."""
    image_scale: Positive = 1.0
    """The teacher sees the batch resized by this factor before its trunk; not with crops."""
    placement: Literal["in_process", "pool"] = "in_process"
    """Who makes soft labels: each training worker, or Ray actors that work on the next batches."""
    actors: PositiveCount = 1
    gpus_per_actor: NonNegative = 0
    """GPUs, or the fraction of one, that an actor of the pool has; 0: it computes on CPUs."""
    cpus_per_actor: NonNegative = 0
    """CPUs that an actor of the pool reserves in Ray, and its threads; 0: it shares the trainers',
    on one thread. Labels are bitwise those in process where cpus_per_worker is as many."""
    batches_ahead: PositiveCount = 2
    """Steps whose soft labels are being made in the pool while one is trained on."""
    top_k: PositiveCount | None = None
    """Keep so many of a soft label's probabilities, and spread the rest evenly; null: all."""
    stored: bool = False
    """Read the soft labels that `longtail prepare --soft-labels` made of images as they are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stored and self.placement == "pool":
            raise ValueError("stored soft labels need no pool: set placement to in_process")
        if self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ValueError(
                f"gpus_per_actor {self.gpus_per_actor:g}: a fraction of one GPU, or whole ones"
            )
        if (self.pretrained is None) == (self.train is None):
            raise ValueError(
                "a teacher needs weights: give exactly one of `pretrained` (open_clip tag or local "
                "file) and `train` (a teacher with random weights gives meaningless soft labels)"
            )
        return self


class Semantic(Section):
    """The semantic branch (supplement E.1): a linear layer, forward KL, weight 0.5."""

    weight: NonNegative = 0.5
    denoising: bool = True
    """Learn from the positive denoising queries as well, with the same weight."""
    objective: Literal["logits", "features"] = "logits"
    """KL to the teacher's distribution over the categories, or the L1 distance of the projected
    feature, of unit length, to the teacher's embedding of the box."""
    layers: Literal["last", "all"] = "last"
    """Decoder layers that the branch reads; every layer has the same weight."""
    columns: Literal["all", "federated"] = "all"
    """Categories of both distributions: the vocabulary, or the columns of the step's class loss. Of
    the latter a box counts by the share of its soft label that they hold: docs/semantics.md."""
    entropy_weighting: bool = False
    """Weigh each box by twice the entropy of its soft label over that of the uniform one (an option
    of RichSem's code): what the teacher finds ambiguous counts up to 2, what it is sure of 0."""
    labels: Literal["soft", "hard"] = "soft"
    """The teacher's distribution, or the box's own category and nothing else; boxes without a
    category then take no part, and no teacher runs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.objective == "features":
            for key, allowed in (("columns", "all"), ("labels", "soft")):
                if getattr(self, key) != allowed:
                    raise ValueError(
                        f"{key} {getattr(self, key)} belongs to objective logits; objective "
                        f"features compares embeddings, which have no categories: set it to "
                        f"{allowed}"
                    )
        if self.entropy_weighting and (self.objective == "features" or self.labels == "hard"):
            raise ValueError(
                "entropy_weighting reads soft labels, and with objective features or labels hard "
                "there are none; set it to false"
            )
        return self
