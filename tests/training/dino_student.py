"""The real detector, small, with the semantic branch, and steps of every kind for it."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from small_dino import NUM_CATEGORIES, SMALL
from torch import Tensor

from pipeline.data.batch import Batch, Targets, collate
from pipeline.detectors import build_detector
from pipeline.detectors.interface import LossContext
from pipeline.recipe import DetectorSection, Semantic
from pipeline.semantics.branch import SemanticBranch
from pipeline.training.student import Student

SIDE = 64
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"boxes": 0},
    {"boxes": 1, "coarse": True, "box_weight": 0.0},
    {"boxes": 0, "only": (0, 1)},
    {"boxes": 2, "class_weight": 0.0, "unlabelled": True},
    {},
    {"coarse": (0, 1), "sampled_negatives": False},
)
"""Steps: boxes of all weights, none at all, image-level labels, none in the first half of the
batch (one of two ranks), boxes without labels, image-level labels in that half alone."""


def dino_student(semantic: Semantic | None = None, **changes: Any) -> Student:
    """The same random weights each time."""
    torch.manual_seed(0)
    text = F.normalize(torch.randn(NUM_CATEGORIES, 16), dim=-1)
    section = DetectorSection.model_validate(SMALL | changes)
    language = section.class_head.kind == "language"
    detector = build_detector(
        section, num_categories=NUM_CATEGORIES, text_embeddings=text if language else None
    )
    semantic = semantic or Semantic()
    branch = SemanticBranch(detector.feature_dim, text, 20.0, semantic)
    return Student(detector, branch, semantic)


def dino_image(step: int, position: int) -> tuple[Tensor, Targets, Tensor]:
    """Pixels, targets and soft labels of one image of a step, always the same."""
    kind = KINDS[step % len(KINDS)]
    number = 100 * step + position
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    count = 1 + position % 4
    if position in kind.get("only", range(1000)):
        count = kind.get("boxes", count)
    centre = torch.rand(count, 2, generator=generator) * 0.5 + 0.25
    extent = torch.rand(count, 2, generator=generator) * 0.4 + 0.05
    boxes, labels = torch.cat([centre, extent], 1), torch.arange(count) % 3 * 4
    coarse = kind.get("coarse", False)
    coarse = coarse if isinstance(coarse, bool) else position in coarse
    if coarse:
        boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(count, 4).clone()
    if kind.get("unlabelled"):
        labels = torch.full_like(labels, -1)
    switches = ("box_weight", "class_weight", "sampled_negatives")
    weights = {name: kind[name] for name in switches if name in kind}
    size = (SIDE, SIDE)
    targets = Targets(boxes, labels, number, size, size, number, coarse=coarse, **weights)
    soft = torch.randn(count, NUM_CATEGORIES, generator=generator).softmax(-1)
    return pixels, targets, soft


def dino_batches(
    step: int, batch_size: int, micro_batch: int, rank: int = 0, world_size: int = 1
) -> list[tuple[Batch, list[Tensor]]]:
    """This rank's micro-batches of a step, with their soft labels."""
    share = batch_size // world_size
    found = []
    for start in range(rank * share, (rank + 1) * share, micro_batch):
        images = [dino_image(step, start + i) for i in range(micro_batch)]
        pixels, targets, soft = zip(*images, strict=True)
        names = [f"images/{target.image_id}" for target in targets]
        found.append((collate(pixels, targets, names, names), list(soft)))
    return found


def dino_context(step: int, batch_size: int) -> LossContext:
    """Facts of the global batch: boxes, and six columns, those of its labels among them."""
    targets = [dino_image(step, position)[1] for position in range(batch_size)]
    columns = np.union1d([0, 4, 8], np.random.default_rng(step).permutation(NUM_CATEGORIES)[:3])
    num_boxes = max(1.0, sum(len(t.labels) for t in targets))
    return LossContext(num_boxes, torch.from_numpy(columns), batch_size)
