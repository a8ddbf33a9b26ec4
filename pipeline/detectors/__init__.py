"""Detectors, and the one place that chooses among them."""

from torch import Tensor

from pipeline import recipe
from pipeline.detectors.dino.detector import DinoDetector


def build_detector(
    section: recipe.DetectorSection,
    *,
    num_categories: int,
    text_embeddings: Tensor | None,
    pretrained: bool = True,
) -> DinoDetector:
    """The detector of the recipe, with random weights beside those of its backbone.

    `text_embeddings` (num_categories, D), unit rows, are needed by the language class head;
    `pretrained=False` leaves the backbone's weights out, for a model that is loaded next.
    """
    return DinoDetector(section, num_categories, text_embeddings, pretrained=pretrained)
