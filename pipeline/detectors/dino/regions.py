"""Decoder features that answer for boxes of the ground truth: what the semantic branch learns."""

import torch
from torch import Tensor

from pipeline.detectors.dino.denoising import DenoisingLayout
from pipeline.detectors.dino.image_level import ImageLabels
from pipeline.detectors.dino.matcher import Matches
from pipeline.detectors.interface import MatchedRegions


def features_at(hidden: Tensor, image: Tensor, query: Tensor) -> Tensor:
    """(L, P, dim) of `hidden` (L, B, T, dim) at the (L, P) or (P,) places."""
    layer = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[layer, image, query]


def matched_regions(
    hidden: Tensor, num_denoising: int, matches: Matches, layout: DenoisingLayout | None
) -> list[tuple[MatchedRegions, ...]]:
    """What each layer's features (L, B, T, dim) were matched to; denoising queries come first.

    Of each layer, from the first on: its Hungarian matches and, with a layout, its positives.
    """
    layers = range(len(hidden))  # the encoder's matches follow those of the decoder layers
    image, query, box = (part[: len(hidden)] for part in matches[:3])
    features = features_at(hidden, image, num_denoising + query)
    one = features.new_ones(features.shape[1]).float()
    regions = [(MatchedRegions(features[n], image[n], box[n], one),) for n in layers]
    if layout is None:
        return list(regions)
    copies = layout.weight[layout.image, layout.query].reciprocal()
    positives = features_at(hidden, layout.image, layout.query)
    return [
        (*matched, MatchedRegions(positives[n], layout.image, layout.box, copies))
        for n, matched in zip(layers, regions, strict=True)
    ]


def with_chosen(
    regions: list[tuple[MatchedRegions, ...]], features: Tensor, labels: ImageLabels
) -> list[tuple[MatchedRegions, ...]]:
    """The same with the queries that image-level labels fall on: `features` (L, P, dim) of them.

    They answer for the coarse boxes of their labels, which nothing is matched to.
    """
    one = features.new_ones(features.shape[1]).float()
    found = []
    for (matched, *denoising), chosen in zip(regions, features, strict=True):
        parts = zip(matched, (chosen, labels.image, labels.box, one), strict=True)
        found.append((MatchedRegions(*(torch.cat(part) for part in parts)), *denoising))
    return found
