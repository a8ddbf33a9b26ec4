"""Contrastive denoising (DINO, section 3.3) with a fixed number of queries.

An image with n boxes has `num_queries // (2 n)` groups; a group holds one positive and one negative
query of each box, and queries that fill no whole group are unused. Each query of the image weighs
`1 / groups`, so a box counts once, as where DINO divides by one number of groups for the batch.
With more boxes than `num_queries / 2`, a random subset of them makes one group, weighted so that
the expectation is that of all boxes.

The official code takes the groups of the image with the most boxes for the whole batch and fills
the others' groups with empty queries, which take part in attention and count as background. There,
an image's loss depends on which others share its batch, hence on workers and micro-batches, and
memory on the boxes. Here it does not; with equal numbers of boxes both are the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import recipe
from pipeline.data.batch import Targets
from pipeline.detectors.boxes import cxcywh_to_xyxy, within_logit_bounds, xyxy_to_cxcywh


class DenoisingLayout(NamedTuple):
    """What each of the N denoising queries of each image stands for.

    `group` is (B, N) int64, -1 where unused; `weight` (B, N), of its losses, 0 where unused;
    `labels` (B, N) and `boxes` (B, N, 4) cxcywh are the noised query. Positives reconstruct their
    box, negatives are background: `image`, `query` and `box` are (P,) int64, one entry for each
    positive, `box` the index among the image's boxes.
    """

    group: Tensor
    weight: Tensor
    labels: Tensor
    boxes: Tensor
    image: Tensor
    query: Tensor
    box: Tensor

    def attention_mask(self, num_matching: int) -> Tensor:
        """(B, N, N + num_matching) bool, True where a denoising query may look: its own group, and
        all matching queries, which follow the denoising ones."""
        same = (self.group[:, :, None] == self.group[:, None, :]) & (self.group >= 0)[:, None, :]
        matching = same.new_ones((*self.group.shape, num_matching))
        return torch.cat([same, matching], dim=2)


class Noise(NamedTuple):
    """One image's draw, on the CPU: everything that depends on the seed and the number of boxes."""

    group: Tensor
    positive: Tensor
    box: Tensor
    weight: Tensor
    flip: Tensor
    """Whether the random `label` takes the place of the true one."""
    label: Tensor
    shift: Tensor
    """(N, 4) signed shift of each corner coordinate in units of half the box's size."""


def make_denoising(
    section: recipe.Denoising, targets: Sequence[Targets], num_categories: int
) -> DenoisingLayout:
    """Noised queries for a batch; noise comes from each image's own `seed` alone.

    Unlabelled boxes (-1) get a random label. Corners move by up to `box_noise` half sizes for
    positives, by one to two times that for negatives.
    """
    device = targets[0].boxes.device
    draws = [draw_noise(section, target, num_categories) for target in targets]
    drawn = Noise(*(torch.stack(part) for part in zip(*draws, strict=True)))
    image, query = drawn.positive.nonzero(as_tuple=True)  # on the CPU: it would wait for a GPU
    noise = Noise(*(part.to(device, non_blocking=True) for part in drawn))
    most = max(1, *(len(target.labels) for target in targets))
    labels = torch.stack([_pad(target.labels, most) for target in targets])
    boxes = torch.stack([_pad(target.boxes.float(), most) for target in targets])
    true_labels = labels.gather(1, noise.box)
    true_boxes = boxes.gather(1, noise.box[..., None].expand(-1, -1, 4))
    half = true_boxes[..., 2:] / 2
    corners = cxcywh_to_xyxy(true_boxes) + noise.shift * torch.cat([half, half], dim=-1)
    return DenoisingLayout(
        noise.group,
        noise.weight,
        torch.where(noise.flip | (true_labels < 0), noise.label, true_labels),
        # Corners may have changed places: the logit's bounds keep every side above zero.
        within_logit_bounds(xyxy_to_cxcywh(corners.clamp(0, 1))),
        image.to(device, non_blocking=True),
        query.to(device, non_blocking=True),
        drawn.box[image, query].to(device, non_blocking=True),
    )


def draw_noise(section: recipe.Denoising, target: Targets, num_categories: int) -> Noise:
    """The draw of an image, from its own `seed`; of its boxes only their number is looked at."""
    count, num_boxes = section.num_queries, len(target.labels)
    generator = torch.Generator().manual_seed(target.seed)
    chosen = min(num_boxes, count // 2)
    groups = count // (2 * chosen) if chosen else 0
    used = groups * 2 * chosen
    slot = torch.arange(count)
    order = torch.arange(num_boxes)
    if chosen < num_boxes:
        order = torch.randperm(num_boxes, generator=generator)[:chosen]
    unused = slot >= used
    within = slot % max(2 * chosen, 1)
    positive = (within < chosen) & ~unused
    box = torch.where(unused, 0, order[within % chosen]) if chosen else torch.zeros_like(slot)
    weight = num_boxes / (groups * chosen) if chosen else 0.0

    # DINO flips half of `label_noise`.
    flip = torch.rand(count, generator=generator) < section.label_noise * 0.5
    label = torch.randint(num_categories, (count,), generator=generator)
    sign = torch.randint(2, (count, 4), generator=generator) * 2.0 - 1.0
    size = torch.rand((count, 4), generator=generator) + (~positive[:, None])
    return Noise(
        group=torch.where(unused, -1, slot // max(2 * chosen, 1)),
        positive=positive,
        box=box,
        weight=torch.full((count,), weight).masked_fill(unused, 0.0),
        flip=flip,
        label=label,
        shift=sign * size * section.box_noise,
    )


def _pad(values: Tensor, length: int) -> Tensor:
    """Zeros after `values` up to `length` rows."""
    padding = values.new_zeros((length - values.shape[0], *values.shape[1:]))
    return torch.cat([values, padding])
