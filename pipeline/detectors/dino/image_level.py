"""Detic's image-level loss (Zhou et al. 2022, section 4.2) on DINO, RichSem's rival.

An image with coarse labels gives no boxes: nothing is matched and nothing is denoised. Instead each
of its labels falls on one query, with the binary cross-entropy over the whole vocabulary, at every
decoder layer, as in Detic's Deformable DETR: `max_size` takes the largest predicted box of the
layer, `max_score` the query that scores highest for the label, `image_box` the last query, whose
first box is made to be the whole image (Detic appends such a proposal). An image's labels share its
weight; the encoder's cells and the denoising queries have no part in it.

The published Deformable DETR also pushes all queries of such an image towards background on the
sampled columns. Here the class loss does that for sources whose negatives are `sampled`, sparing
the image's own labels; for others it has nothing to say of such an image.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import recipe
from pipeline.data.batch import Targets
from pipeline.detectors.dino.negatives import column_positions
from pipeline.detectors.interface import LossContext


class ImageLabels(NamedTuple):
    """Labels of image-level images, one for each coarse box: `image`, `box` (the index in its
    image) and `label` (a column of the vocabulary) are (P,) int64; `weight` (P,) sums to 1 over an
    image, each category counting alike however often it is named."""

    image: Tensor
    box: Tensor
    label: Tensor
    weight: Tensor


def is_image_level(section: recipe.Losses, target: Targets) -> bool:
    """Whether the image is for the image-level loss."""
    return section.image_level != "boxes" and target.coarse


def without_image_level(section: recipe.Losses, targets: Sequence[Targets]) -> list[Targets]:
    """Targets for all other losses: without the boxes of images that are for this one.

    Their class loss has background alone, and that only where what they do not name is absent.
    """
    return [
        replace(
            target,
            boxes=target.boxes[:0],
            labels=target.labels[:0],
            class_weight=target.class_weight * target.sampled_negatives,
            box_weight=0.0,
        )
        if is_image_level(section, target)
        else target
        for target in targets
    ]


def spared_labels(section: recipe.Losses, targets: Sequence[Targets]) -> list[Tensor]:
    """Of each image the labels that are no background of it: those of its image-level loss."""
    return [t.labels if is_image_level(section, t) else t.labels[:0] for t in targets]


def image_labels(section: recipe.Losses, targets: Sequence[Targets]) -> ImageLabels:
    """The labels of the batch's image-level images; there may be none."""
    device = targets[0].labels.device
    images: list[int] = []
    boxes: list[int] = []
    labels, weights = [targets[0].labels[:0]], [targets[0].boxes[:0, 0].float()]
    for i, target in enumerate(targets):
        if not is_image_level(section, target):
            continue
        given = target.labels
        images += [i] * len(given)
        boxes += range(len(given))
        labels.append(given)
        same = (given[:, None] == given[None]).sum(1)
        share = (given >= 0) / same
        weights.append(target.class_weight * share / share.sum().clamp(min=1))
    where = torch.tensor([images, boxes], dtype=torch.int64).to(device, non_blocking=True)
    return ImageLabels(where[0], where[1], torch.cat(labels), torch.cat(weights))


def with_image_boxes(section: recipe.Losses, boxes: Tensor, targets: Sequence[Targets]) -> Tensor:
    """Boxes (B, Q, 4) that enter the decoder; for `image_box` the last is the whole image."""
    if section.image_level != "image_box":
        return boxes
    flags = torch.tensor([[[is_image_level(section, target)]] for target in targets])
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).to(boxes, non_blocking=True)
    last = torch.where(flags.to(boxes.device, non_blocking=True), whole, boxes[:, -1:])
    return torch.cat([boxes[:, :-1], last], dim=1)


def choose_queries(
    section: recipe.Losses,
    logits: Tensor,
    boxes: Tensor,
    labels: ImageLabels,
    class_columns: Tensor | None,
    num_categories: int,
) -> Tensor:
    """(L, P) the query that each label falls on at each layer.

    `logits` (L, B, Q, K) are of the class columns, which hold the labels, `boxes` (L, B, Q, 4)
    cxcywh, both of the matching queries.
    """
    layers, _, queries, _ = logits.shape
    if section.image_level == "image_box":
        return labels.image.new_full((layers, len(labels.image)), queries - 1)
    if section.image_level == "max_size":
        largest = (boxes[..., 2] * boxes[..., 3]).detach().argmax(2)  # (L, B)
        return largest[:, labels.image]
    column = labels.label
    if class_columns is not None:
        column = column_positions(class_columns, num_categories)[column]
    scores = logits.detach()[:, labels.image, :, column.clamp(min=0)]  # (P, L, Q)
    return scores.argmax(2).T


def image_level_losses(
    section: recipe.Losses, logits: Tensor, labels: ImageLabels, context: LossContext
) -> dict[str, Tensor]:
    """`loss/image_level` of the last layer, `_0`, `_1`, ... of the earlier ones, by log key.

    `logits` (L, P, C) of the chosen queries are over the whole vocabulary.
    """
    target = torch.zeros_like(logits).scatter(
        2, labels.label.clamp(min=0).expand(len(logits), -1)[..., None], 1.0
    )
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(2)
    sums = section.weight_image_level * (entropy * labels.weight).sum(1) / context.num_images
    suffixes = [*(f"_{layer}" for layer in range(len(logits) - 1)), ""]
    return {f"loss/image_level{s}": x for s, x in zip(suffixes, sums.unbind(), strict=True)}
