"""Memory of one rank by part, and what it receives from the others, at each stage of ZeRO.

Arithmetic on the sizes of a model. What each stage divides among ranks is that of the ZeRO paper
(Rajbhandari et al. 2020), for training whose parameters are float32; what DeepSpeed holds beside
(copies, buckets, gathered weights) was read in its source, version 0.19.8.
"""

from typing import Literal, NamedTuple

from torch import nn

from pipeline.detectors.memory import FLOAT32_BYTES as SINGLE


class Layout(NamedTuple):
    """A stage of ZeRO, and what of it is offloaded to the host (`training.offload`)."""

    zero_stage: int
    offload: Literal["none", "optimizer", "all"] = "none"

    def __str__(self) -> str:
        return f"{self.zero_stage}" + ("" if self.offload == "none" else f"+{self.offload}")


LAYOUTS = (Layout(0), Layout(1), Layout(2), Layout(3), Layout(3, "all"))
"""Those that `longtail check` always shows."""
BUCKET = 50_000_000
"""Elements that are reduced together (`training/engine.py`), or the model where it is smaller."""
REUSE = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance: ZeRO 3 does not give up gathered weights that are used
again before so many elements, so up to half of it stays from the forward to the backward pass."""
PREFETCH = 50_000_000
"""DeepSpeed's stage3_prefetch_bucket_size: elements that are gathered ahead."""


class ModelSize(NamedTuple):
    """Elements of all parameters and of those that train, and bytes of buffers."""

    parameters: int
    trained: int
    buffers: int

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        """The sizes of a model, which may be on the meta device."""
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return cls(
            sum(number for number, _ in sizes),
            sum(number for number, trains in sizes if trains),
            sum(b.numel() * b.element_size() for b in model.buffers()),
        )


class Training(NamedTuple):
    """What memory depends on beside the model: bytes of `activations` and of a `teacher` with the
    most that it needs while it works, micro-steps of a step, and whether weights are averaged."""

    workers: int
    micro_steps: int
    averaged: bool
    on_gpu: bool
    activations: int
    teacher: int = 0
    teacher_peak: int = 0


class RankMemory(NamedTuple):
    """Bytes on one rank's device, and in the memory of its `host`; `received` in one step."""

    parameters: int
    gradients: int
    moments: int
    averages: int
    copies: int
    """ZeRO's own copy of the weights, buckets, and weights that are gathered."""
    working: int
    """Activations, the teacher's or the optimizer's temporaries: the largest of them. With the
    activations of stage 2 the gradient of a micro-step, where a step has several."""
    teacher: int
    host: int
    """What is offloaded, with what DeepSpeed holds there beside."""
    received: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self[:7])


def rank_memory(layout: Layout, model: ModelSize, training: Training) -> RankMemory:
    """What one of `training.workers` ranks holds and receives."""
    stage, workers = layout.zero_stage, training.workers
    parameters = _part(model.parameters, workers if stage == 3 else 1)
    gradients = _part(model.trained, workers if stage >= 2 else 1)
    own = _part(model.trained, workers if stage >= 1 else 1)
    moments, averages = 2 * own, own if training.averaged else 0
    # The step of AdamW makes a root of the second moment, and ZeRO a flat gradient as well.
    step = own * (1 if stage == 0 else 2)
    # Stage 2 adds each micro-step's part of the gradient to that of those before it.
    adding = own if stage == 2 and training.micro_steps > 1 and layout.offload == "none" else 0
    host = 0
    if layout.offload != "none":
        host = moments + averages + _host_copies(layout, own, training)
        moments = averages = step = 0
        if stage == 3:
            gradients = 0
    if layout.offload == "all":
        host += parameters
        parameters = 0
    return RankMemory(
        parameters + model.buffers,
        gradients,
        moments,
        averages,
        _copies(layout, model, training),
        max(training.activations + adding, training.teacher_peak, step),
        training.teacher,
        host,
        _received(layout, model, training),
    )


def _host_copies(layout: Layout, own: int, training: Training) -> int:
    """Beside moments and averages: the weights that AdamW updates there, and their gradient. Stages
    1 and 2 have there what goes back to the device, too, stage 3 the sums of gradients over
    micro-steps, and stage 2 both, where a step has several."""
    return (4 if layout.zero_stage == 2 and training.micro_steps > 1 else 3) * own


def _part(elements: int, ranks: int) -> int:
    """Bytes of a rank's part of so many float32 numbers."""
    return SINGLE * -(-elements // ranks)


def _copies(layout: Layout, model: ModelSize, training: Training) -> int:
    bucket = min(model.trained, BUCKET)
    if layout.zero_stage == 0:
        return SINGLE * bucket if training.workers > 1 else 0
    if layout.zero_stage < 3:
        # With `overlap_comm`, on GPUs, one bucket fills while the other is reduced.
        buckets = 2 if training.on_gpu else 1
        own = _part(model.trained, training.workers) if layout.offload == "none" else 0
        return own + buckets * SINGLE * bucket
    gathered = min(model.parameters, REUSE // 2 + PREFETCH)
    # A bucket is put in the order of ranks, in a copy of it, before it is reduced.
    return SINGLE * (2 * bucket + gathered)


def _received(layout: Layout, model: ModelSize, training: Training) -> int:
    """Bytes of a ring: each rank gets all parts but its own. Gradients are reduced once a step
    without ZeRO and at stage 1, and in each micro-step at stages 2 and 3."""
    reduced, gathered = model.trained, model.trained
    if layout.zero_stage >= 2:
        reduced *= training.micro_steps
    if layout.zero_stage == 3:
        again = max(0, model.parameters - REUSE // 2)
        gathered = (model.parameters + again) * training.micro_steps
    return SINGLE * (reduced + gathered) * (training.workers - 1) // training.workers
