"""The recipe: the one complete, typed description of a stage.

Defaults are the paper's values (RichSem, supplement E; DINO 4-scale), so a recipe file states only
what makes it different. There is no inheritance, no include and no interpolation: what you read,
or what `longtail show` prints, is what runs.
"""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, tree: object) -> object:
        """Python's True is an int, and pydantic would take `batch_size: true` for 1."""
        if isinstance(tree, dict):
            for name, value in tree.items():
                known = cls.model_fields.get(name)
                if isinstance(value, bool) and known is not None and known.annotation is not bool:
                    raise ValueError(f"{name} is not a yes-or-no value, and was given {value}")
        return tree


class Source(Section):
    """One raw data set, as published. Paths are relative to `data.root`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    format: Literal["lvis", "objects365", "imagenet21k", "cc3m"]
    images: str
    annotations: str | None = None
    """json (lvis, objects365), tsv of wnid to category (imagenet21k), tsv of captions (cc3m)."""
    use_labels: bool = True
    """False drops the class labels that the source has (INet-Unl, O365-Box)."""
    use_class: bool = True
    use_box: bool = True
    use_semantic: bool = True
    """The switches hold for every class, box or semantic term: decoder, encoder, denoising."""
    weight: Positive = 1.0
    """Share of this source among the sources of its stream."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.annotations is None:
            raise ValueError(f"source {self.name}: format {self.format} needs `annotations`")
        return self

    @property
    def has_labels(self) -> bool:
        """Whether boxes of this source carry a class."""
        return self.use_labels and self.format != "cc3m"


class Transforms(Section):
    """Sizes in pixels. Extra (image-level) samples are cropped and put into 2x2 mosaics."""

    short_sides: list[PositiveCount] = Field(default=list(range(480, 801, 32)), min_length=1)
    max_side: PositiveCount = 1333
    flip_probability: Fraction = 0.5
    crop_probability: Fraction = 0.5
    crop_short_sides: list[PositiveCount] = Field(default=[400, 500, 600], min_length=1)
    crop_sizes: tuple[PositiveCount, PositiveCount] = (384, 600)
    extra_crop_probability: Fraction = 0.5
    """Of extra samples, each before it goes into its mosaic; sizes are those of the other crops."""
    mosaic: bool = True
    mosaic_cell: PositiveCount = 640
    """Half the side of the square mosaic canvas."""
    evaluation_short_side: PositiveCount = 800
    evaluation_max_side: PositiveCount = 1333
    size_divisor: PositiveCount = 32


class Data(Section):
    """Raw data, its shards, and how the two streams are mixed."""

    root: str
    miniature: Literal["tiny", "quickstart", "benchmark"] | None = None
    """Draw this miniature world at `root` when it is not there yet."""
    miniature_seed: Count = 0
    shards: str | None = None
    """A path or fsspec URL that the tar shards go to; `shards` inside `root` by default."""
    samples_per_shard: PositiveCount = 1000
    bad_sample_budget: Count = 100
    """How many unreadable images one source may have before `prepare` refuses it."""
    train: list[Source] = Field(min_length=1)
    extra: list[Source] = []
    validation: Source | None = None
    vocabulary: str | None = None
    """Name of the source whose categories the detector learns; the first of `train` by default."""
    repeat_threshold: NonNegative = 0.001
    """Repeat-factor sampling of the train stream (LVIS paper, appendix); 0 turns it off."""
    extra_mode: Literal["alternate", "mixed"] = "alternate"
    """Whole steps of extra data in turn with whole steps of train data, or both in each batch."""
    extra_ratio: Positive = 1.0
    """Extra images for each train image."""
    workers: Count = 2
    """Reader processes of each training worker; 0 reads in line."""
    transforms: Transforms = Transforms()

    @property
    def sources(self) -> list[Source]:
        """Every source once: train, extra, validation."""
        last = [self.validation] if self.validation else []
        return [*self.train, *self.extra, *last]

    @property
    def vocabulary_source(self) -> Source:
        """The source whose categories are the detector's columns."""
        name = self.vocabulary or self.train[0].name
        return next(source for source in self.sources if source.name == name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source names must differ; used more than once: {', '.join(twice)}")
        if self.vocabulary is not None and self.vocabulary not in names:
            close = difflib.get_close_matches(self.vocabulary, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"vocabulary {self.vocabulary!r} is none of the sources {names}{hint}")
        if self.vocabulary_source.format == "cc3m":
            raise ValueError("captions have no categories: take the vocabulary from another source")
        return self


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
    image_scale: Positive = 1.0
    """The teacher sees the batch resized by this factor before its trunk."""

    @model_validator(mode="after")
    def _check(self) -> Self:
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


class Backbone(Section):
    """A timm model, features only."""

    name: str = "resnet50"
    weights: str | None = "pretrained"
    """`pretrained` (timm's own tag), a local weights file, or null for random."""
    out_indices: list[Count] = Field(default=[2, 3, 4], min_length=1)
    norm: Literal["frozen", "group", "own"] = "frozen"
    """Frozen batch norm (with trained weights), group norm (from scratch), or the model's own."""
    frozen_stages: Count = 2
    """How many leading stages, the stem included, do not train."""
    arguments: dict[str, bool | int | float | str | list[int]] = {}
    """Passed to `timm.create_model`."""


class ClassHead(Section):
    """Cosine to frozen text embeddings (RichSem), or a plain linear classifier (DINO)."""

    kind: Literal["language", "linear"] = "language"
    scale: Positive = 100.0
    bias: bool = True
    """A learned scalar bias of the language head, started so that scores begin near 0.01."""


class Denoising(Section):
    """Contrastive denoising (DINO, section 3.3); `num_queries` is fixed whatever the boxes."""

    num_queries: Count = 200
    label_noise: Fraction = 0.5
    box_noise: NonNegative = 1.0


class Losses(Section):
    """Weights of matching costs and of losses, and the two class losses."""

    cost_class: NonNegative = 2.0
    cost_box_l1: NonNegative = 5.0
    cost_box_giou: NonNegative = 2.0
    weight_class: NonNegative = 1.0
    weight_box_l1: NonNegative = 5.0
    weight_box_giou: NonNegative = 2.0
    focal_alpha: Fraction = 0.25
    focal_gamma: NonNegative = 2.0
    federated_categories: Count = 50
    """Columns of the federated class loss (Zhou et al. 2021); 0 uses every column."""
    federated_power: NonNegative = 0.5


class DetectorSection(Section):
    """DINO 4-scale by default."""

    kind: Literal["dino"] = "dino"
    backbone: Backbone = Backbone()
    hidden_dim: PositiveCount = 256
    num_heads: PositiveCount = 8
    num_points: PositiveCount = 4
    num_feature_levels: PositiveCount = 4
    encoder_layers: PositiveCount = 6
    decoder_layers: PositiveCount = 6
    ffn_dim: PositiveCount = 2048
    dropout: Fraction = 0.0
    num_queries: PositiveCount = 900
    class_head: ClassHead = ClassHead()
    denoising: Denoising = Denoising()
    losses: Losses = Losses()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(
                f"hidden_dim {self.hidden_dim} must be a multiple of twice num_heads "
                f"{self.num_heads} (heads share it, and so do sine and cosine)"
            )
        if self.num_feature_levels < len(self.backbone.out_indices):
            raise ValueError(
                f"num_feature_levels {self.num_feature_levels} is fewer than the "
                f"{len(self.backbone.out_indices)} maps of backbone.out_indices"
            )
        return self


class Training(Section):
    """AdamW, step or cosine schedule; sizes are of the global batch, whatever the world size."""

    steps: PositiveCount
    batch_size: PositiveCount = 16
    micro_batch: PositiveCount = 2
    """Most images that one worker puts through the model at once."""
    learning_rate: Positive = 1e-4
    backbone_learning_rate: Positive = 1e-5
    weight_decay: NonNegative = 1e-4
    clip_norm: NonNegative = 0.1
    warmup_steps: Count = 0
    schedule: Literal["step", "cosine"] = "step"
    drop_steps: list[PositiveCount] = []
    drop_factor: Fraction = 0.1
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    checkpoint_every: PositiveCount = 1000
    keep_checkpoints: PositiveCount = 3
    log_every: PositiveCount = 50
    max_skipped_steps: Count = 10
    """How many steps with a loss that is not finite may be skipped before the run stops."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        late = [step for step in self.drop_steps if step >= self.steps]
        if late:
            raise ValueError(f"drop_steps {late} are not before the last step ({self.steps})")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} is not before the last step ({self.steps})"
            )
        if self.drop_steps and self.schedule != "step":
            raise ValueError("drop_steps belong to `schedule: step`")
        return self


class Evaluation(Section):
    """Which detections are kept, on how many images, and how often.

    The LVIS protocol judges the best 300 of an image over all categories; fixed AP needs more to be
    kept.
    """

    batch_size: PositiveCount = 1
    max_detections: PositiveCount = 300
    """Detections of an image that are kept and written, over all categories."""
    use_ema: bool = True
    """Evaluate the averaged weights where the run keeps them."""
    example_images: Count = 12
    every: Count = 0
    """Evaluate while training each so many steps, on `subset_images`; 0: only at the end. A recipe
    without data.validation is never evaluated."""
    subset_images: Count = 500
    """Images of the evaluations while training, the same each time; 0: all."""
    cpus: NonNegative = 0
    """CPUs that an evaluation while training reserves in Ray; 0: it shares the trainers'."""
    gpus: NonNegative = 0
    """GPUs that an evaluation while training reserves in Ray; 0: it runs on the CPU."""


class Logging(Section):
    """Where figures go besides metrics.jsonl; `wandb` and `trackio` name a project there."""

    tensorboard: bool = True
    wandb: str | None = None
    trackio: str | None = None


class Cluster(Section):
    """Ray: how many workers, what each one holds, and how often to recover."""

    workers: PositiveCount = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: NonNegative = 1
    address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine, on loopback."""
    max_failures: Count = 3
    object_store_megabytes: PositiveCount = 200


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
        if training.batch_size % cluster.workers:
            raise ValueError(
                f"training.batch_size {training.batch_size} does not divide among "
                f"cluster.workers {cluster.workers}; choose a multiple"
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
        return self

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
