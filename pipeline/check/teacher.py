"""What a teacher in the training process holds on its worker's device: counted, not computed."""

from typing import NamedTuple

import torch

from pipeline.check.activations import MicroBatch
from pipeline.check.live_bytes import LiveBytes, fake_mode, without_memory
from pipeline.detectors.memory import training_memory
from pipeline.recipe import Recipe
from pipeline.semantics.clip import model_config, new_clip
from pipeline.semantics.towers.choice import region_reader


class TeacherBytes(NamedTuple):
    """Bytes of the image tower (the text tower does not stay), and the most beside it while the
    soft labels of a micro-batch are made."""

    weights: int
    peak: int


def teacher_bytes(recipe: Recipe, batch: MicroBatch) -> TeacherBytes:
    """Zero where no teacher works in the training process: without soft labels, with stored ones,
    and with a pool."""
    section = recipe.teacher
    if not recipe.uses_soft_labels or section.stored or section.placement == "pool":
        return TeacherBytes(0, 0)
    config, mode, live = model_config(section.model), fake_mode(), LiveBytes()
    with torch.device("meta"):
        visual = new_clip(section.model).visual
    without_memory(visual.eval().requires_grad_(False), mode)
    read = region_reader(section, config, visual)
    with mode:
        pixels = torch.empty(batch.images, 3, batch.height, batch.width)
        boxes = [torch.empty(batch.boxes, 4) for _ in range(batch.images)]
    with torch.no_grad(), live:
        read(pixels, boxes)
    return TeacherBytes(training_memory(visual).weights, live.peak)
