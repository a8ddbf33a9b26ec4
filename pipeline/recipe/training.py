"""Recipe sections on a run: training, evaluation, logging, the cluster."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.recipe.section import Count, Fraction, NonNegative, Positive, PositiveCount, Section


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
    drop_steps: list[PositiveCount] = Field(default=[])
    drop_factor: Fraction = 0.1
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the host's memory instead of the GPU's: `optimizer` moments, averages and what
    AdamW updates, from `zero_stage` 1 on; `all` the parameters too, at 3. AdamW then runs on the
    CPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    """Compute the detector's transformer layers again in the backward pass; the backbone's stages
    are chosen by detector.backbone.checkpointed_stages."""
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
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload {self.offload!r} needs a zero_stage of at least {least}, and it is "
                f"{self.zero_stage}, which divides nothing of that among workers; raise zero_stage"
            )
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
    samples: bool = False
    """Enter what each step consumed into samples_rankN.jsonl: docs/reliability.md."""
    wandb: str | None = None
    trackio: str | None = None


class Cluster(Section):
    """Ray: how many workers, what each one holds, and how often to recover."""

    workers: int | list[int] = 1
    """How many, or `[least, most]`: as many as there is place for, as nodes come and go."""
    cpus_per_worker: Positive = 1
    gpus_per_worker: NonNegative = 1
    address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine, on loopback."""
    max_failures: Count = 3
    """How often lost workers are begun anew before the run ends; notices of preemption and nodes
    that join are not counted."""
    hang_timeout: NonNegative | None = 600
    """Seconds without progress of any worker after which the one that the others wait for is ended
    and the run goes on from its newest checkpoint; null or 0: never. Longer than the longest part
    of a step and than the writing of one file of a checkpoint."""
    object_store_megabytes: PositiveCount = 200

    @field_validator("workers", mode="before")
    @classmethod
    def _one_or_two(cls, value: object) -> object:
        numbers = value if isinstance(value, list) and len(value) == 2 else [value]
        counts = [n for n in numbers if type(n) is int and n >= 1]
        if len(counts) < len(numbers) or counts != sorted(counts):
            raise ValueError(
                f"workers is {value}; give a number of at least 1, or two of them, [least, most]"
            )
        return value

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the nodes that are there."""
        return not isinstance(self.workers, int)

    @property
    def min_workers(self) -> int:
        """The fewest workers that training goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that training takes, and what other work is divided by."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]
