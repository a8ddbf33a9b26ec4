"""What no step exceeds, however many boxes the images have."""

from typing import NamedTuple

from pipeline.recipe import DetectorSection, Semantic


class StepBounds(NamedTuple):
    """Of a micro-batch: queries of each image, boxes of an image, and the bytes of what grows with
    them: the matcher's costs (float32) and the attention masks of denoising (a byte each)."""

    queries: int
    denoising_queries: int
    boxes: int
    cost_bytes: int
    mask_bytes: int


def step_bounds(section: DetectorSection, max_boxes: int, num_images: int) -> StepBounds:
    """The bounds for `num_images` images of at most `max_boxes` boxes each."""
    queries, denoising = section.num_queries, section.denoising.num_queries
    layers = section.decoder_layers + 1  # and the encoder's selection
    return StepBounds(
        queries,
        denoising,
        max_boxes,
        4 * layers * num_images * queries * max_boxes,
        num_images * denoising * (denoising + queries),
    )


def branch_bytes(
    section: DetectorSection, semantic: Semantic, max_boxes: int, num_images: int, width: int
) -> int:
    """Most bytes that the semantic branch keeps of a micro-batch for its backward pass.

    Two float32 rows of `width` for each region, the student's and the teacher's: of the categories,
    or of embeddings for the objective `features`.
    """
    # A query answers for one box at most, but any number of image-level labels may share one.
    boxes = section.losses.image_level == "boxes"
    matched = min(section.num_queries, max_boxes) if boxes else max_boxes
    denoised = section.denoising.num_queries // 2 if semantic.denoising else 0
    layers = section.decoder_layers if semantic.layers == "all" else 1
    return 2 * 4 * width * layers * num_images * (matched + denoised)
