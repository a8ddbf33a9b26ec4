"""DINO's losses: focal (federated), L1 and generalised IoU, of every layer at once in float32."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import recipe
from pipeline.data.batch import Targets
from pipeline.detectors.boxes import cxcywh_to_xyxy, generalized_iou
from pipeline.detectors.dino.denoising import DenoisingLayout
from pipeline.detectors.dino.focal import SumOfFocalLosses
from pipeline.detectors.dino.matcher import Matches, PaddedTargets, match
from pipeline.detectors.dino.negatives import Negatives, column_positions, negative_weights
from pipeline.detectors.interface import LossContext, Shares


class LayerOutputs(NamedTuple):
    """Predictions of several layers: `logits` (L, B, Q, K) of the class columns in use, `boxes`
    (L, B, Q, 4) cxcywh; float32."""

    logits: Tensor
    boxes: Tensor


class Outputs(NamedTuple):
    """Everything that a loss falls on: decoder layers, the encoder's selection as a single layer,
    and the denoising queries of the decoder layers with their layout, or None."""

    decoder: LayerOutputs
    encoder: LayerOutputs
    denoising: LayerOutputs | None
    layout: DenoisingLayout | None


class Assignment(NamedTuple):
    """Which query of which image answers for which box: `image`, `query` and `box` are (L, P)
    int64. `weight` is (B, Q), of each query's terms."""

    image: Tensor
    query: Tensor
    box: Tensor
    weight: Tensor


class ImageWeights(NamedTuple):
    """(B,) weights of the class and of the box terms of each image, and those of negatives in each
    class column, None where all are 1."""

    classes: Tensor
    boxes: Tensor
    negatives: Negatives | None = None


def image_weights(targets: Sequence[Targets], shares: Shares) -> ImageWeights:
    """The weights of a batch, on the device of its boxes."""
    pairs = [
        (target.class_weight * classes, target.box_weight * boxes)
        for target in targets
        for classes, boxes in [(shares.classes[target.extra], shares.boxes[target.extra])]
    ]
    weights = torch.tensor(pairs, dtype=torch.float32)
    classes, boxes = weights.to(targets[0].boxes.device, non_blocking=True).unbind(1)
    return ImageWeights(classes, boxes)


def pad_targets(
    targets: Sequence[Targets], class_columns: Tensor | None, num_categories: int
) -> PaddedTargets:
    """One layout for a batch, with each label's position among the class columns in use.

    Labels of images that are not to teach classes are left out, so matching does not see them.
    """
    counts = [len(target.labels) for target in targets]
    like = targets[0].boxes
    boxes = like.new_full((len(targets), max(counts), 4), 0.5, dtype=torch.float32)
    labels = targets[0].labels.new_full((len(targets), max(counts)), -1)
    for i, (target, count) in enumerate(zip(targets, counts, strict=True)):
        boxes[i, :count] = target.boxes
        if target.class_weight:
            labels[i, :count] = target.labels
    if class_columns is None:
        return PaddedTargets(boxes, labels, counts)
    position = column_positions(class_columns, num_categories)
    columns = torch.where(labels >= 0, position[labels.clamp(min=0)], -1)
    if labels.device.type == "cpu":  # A look at a GPU would wait for it.
        assert not bool(((labels >= 0) & (columns < 0)).any()), (
            "context.class_columns lacks a label of this batch"
        )
    return PaddedTargets(boxes, columns, counts)


def box_costs(section: recipe.Losses, targets: Sequence[Targets]) -> Tensor | None:
    """(B,) what the box costs of each image are multiplied by, or None where all are 1."""
    if section.coarse_box_cost == 1 or not any(target.coarse for target in targets):
        return None
    costs = torch.tensor([section.coarse_box_cost if t.coarse else 1.0 for t in targets])
    return costs.to(targets[0].boxes.device, non_blocking=True)


def matched_assignment(matches: Matches, like: Tensor) -> Assignment:
    """Hungarian pairs, each query of `like` (L, B, Q, ...) weighing 1."""
    return Assignment(matches.image, matches.query, matches.box, like.new_ones(like.shape[1:3]))


def denoising_assignment(layout: DenoisingLayout, num_layers: int) -> Assignment:
    """The positives of the layout, the same in every layer."""
    index = [part.expand(num_layers, -1) for part in (layout.image, layout.query, layout.box)]
    return Assignment(index[0], index[1], index[2], layout.weight)


def focal_loss(
    section: recipe.Losses,
    logits: Tensor,
    assignment: Assignment,
    targets: PaddedTargets,
    image_weight: Tensor,
    negatives: Negatives | None = None,
) -> Tensor:
    """(L,) sum of the sigmoid focal loss over queries and columns; `logits` is (L, B, Q, K)."""
    weight = assignment.weight * image_weight[:, None]
    columns = targets.columns[assignment.image, assignment.box]  # (L, P)
    layer = torch.arange(len(logits), device=logits.device)[:, None]
    row = (layer * logits.shape[1] + assignment.image) * logits.shape[2] + assignment.query
    total: Tensor = SumOfFocalLosses.apply(
        logits,
        weight,
        row * logits.shape[3] + columns.clamp(min=0),
        weight[assignment.image, assignment.query] * (columns >= 0),
        section.focal_alpha,
        section.focal_gamma,
        None if negatives is None else negatives.unmatched,
        None if negatives is None else negatives.matched,
    )
    return total


def box_losses(
    boxes: Tensor, assignment: Assignment, targets: PaddedTargets, image_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(L,) sums over the assigned pairs of L1 and of 1 - GIoU, for `boxes` (L, B, Q, 4)."""
    layer = torch.arange(len(boxes), device=boxes.device)[:, None]
    predicted = boxes[layer, assignment.image, assignment.query]  # (L, P, 4)
    wanted = targets.boxes[assignment.image, assignment.box]
    weight = (assignment.weight * image_weight[:, None])[assignment.image, assignment.query]
    l1 = (predicted - wanted).abs().sum(-1)
    giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return (l1 * weight).sum(1), ((1 - giou) * weight).sum(1)


def detection_losses(
    section: recipe.Losses,
    outputs: LayerOutputs,
    assignment: Assignment,
    targets: PaddedTargets,
    weights: ImageWeights,
) -> dict[str, Tensor]:
    """Weighted sums (L,) of the three terms; still to be divided by the number of boxes."""
    l1, giou = box_losses(outputs.boxes, assignment, targets, weights.boxes)
    classes = focal_loss(
        section, outputs.logits, assignment, targets, weights.classes, weights.negatives
    )
    return {
        "class": section.weight_class * classes,
        "box_l1": section.weight_box_l1 * l1,
        "box_giou": section.weight_box_giou * giou,
    }


def _name(terms: dict[str, Tensor], suffixes: Sequence[str], num_boxes: float) -> dict[str, Tensor]:
    return {
        f"loss/{term}{suffix}": value / num_boxes
        for term, values in terms.items()
        for suffix, value in zip(suffixes, values.unbind(), strict=True)
    }


def compute_losses(
    section: recipe.Losses,
    outputs: Outputs,
    targets: Sequence[Targets],
    context: LossContext,
    num_categories: int,
    spared: Sequence[Tensor] = (),
) -> tuple[dict[str, Tensor], Matches]:
    """Losses by log key, and the Hungarian matches of the decoder layers and of the encoder.

    Keys are `loss/class`, `loss/box_l1` and `loss/box_giou` for the last decoder layer, with
    `_0`, `_1`, ... for the earlier ones, `_encoder`, and `_dn`, `_dn_0`, ... for denoising. Each is
    multiplied by its recipe weight and its image's share, and divided by `context.num_boxes`. The
    official code divides by the mean number of boxes of a rank in one backward pass and takes the
    ranks' mean gradient: the same for a single backward pass in a step, while here accumulation
    does not change it either.
    """
    padded = pad_targets(targets, context.class_columns, num_categories)
    padded = padded._replace(box_cost=box_costs(section, targets))
    negatives = negative_weights(
        targets, padded, context.class_columns, num_categories, context.sampled_columns, spared
    )
    weights = image_weights(targets, context.shares)._replace(negatives=negatives)
    num_layers = len(outputs.decoder.logits)
    earlier = [f"_{layer}" for layer in range(num_layers - 1)]
    stacked = LayerOutputs(
        torch.cat([outputs.decoder.logits, outputs.encoder.logits]),
        torch.cat([outputs.decoder.boxes, outputs.encoder.boxes]),
    )
    matches = match(section, stacked.logits, stacked.boxes, padded)
    assignment = matched_assignment(matches, stacked.logits)
    terms = detection_losses(section, stacked, assignment, padded, weights)
    losses = _name(terms, [*earlier, "", "_encoder"], context.num_boxes)
    if outputs.denoising is not None and outputs.layout is not None:
        assignment = denoising_assignment(outputs.layout, num_layers)
        terms = detection_losses(section, outputs.denoising, assignment, padded, weights)
        suffixes = [f"_dn{suffix}" for suffix in [*earlier, ""]]
        losses |= _name(terms, suffixes, context.num_boxes)
    if not matches.finite:
        losses["loss/class"] = losses["loss/class"] * torch.nan
    return losses, matches
