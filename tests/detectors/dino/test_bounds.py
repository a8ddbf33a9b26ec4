"""The bounds of a step are those of the tensors that it makes."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Targets
from pipeline.detectors.dino import matcher
from pipeline.detectors.dino.bounds import branch_bytes, step_bounds
from pipeline.detectors.dino.denoising import DenoisingLayout
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.interface import LossContext
from pipeline.errors import DataError
from pipeline.recipe import Semantic
from pipeline.semantics.branch import SemanticBranch


def test_crowded_images_need_what_is_stated(
    monkeypatch: pytest.MonkeyPatch,
    make_detector: Callable[..., DinoDetector],
    make_targets: Callable[..., list[Targets]],
    images: tuple[Tensor, Tensor],
) -> None:
    sizes: list[int] = []

    def measured(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: object) -> Tensor:
            result = function(*arguments)
            sizes.append(result.numel() * result.element_size())
            return result

        return call

    monkeypatch.setattr(matcher, "matching_costs", measured(matcher.matching_costs))
    monkeypatch.setattr(DenoisingLayout, "attention_mask", measured(DenoisingLayout.attention_mask))
    detector = make_detector()
    bounds = step_bounds(detector.section, 9, 4)
    detector(*images, make_targets([9, 9, 9, 9]), LossContext(36.0, None))
    assert sorted(sizes) == sorted([bounds.cost_bytes, bounds.mask_bytes])
    sizes.clear()
    detector(*images, make_targets([0, 3, 9, 1]), LossContext(13.0, None))
    assert sorted(sizes) == sorted([bounds.cost_bytes, bounds.mask_bytes])


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("way", ["boxes", "max_size"])
def test_the_branch_keeps_no_more_than_is_stated(
    make_detector: Callable[..., DinoDetector],
    make_targets: Callable[..., list[Targets]],
    images: tuple[Tensor, Tensor],
    layers: Literal["last", "all"],
    way: str,
) -> None:
    """Exactly so much when every image has as many boxes as the bound allows."""
    section = Semantic(layers=layers)
    detector = make_detector(losses={"image_level": way})
    branch = SemanticBranch(32, torch.eye(12, 16), 10.0, section)
    boxes = 6  # one group of denoising queries
    targets = make_targets([boxes] * 4, coarse=way == "max_size")
    output = detector(*images, targets, LossContext(24.0, None))
    regions = [*output.matched]
    if layers == "all":
        regions += [each for layer in output.earlier for each in layer]
    soft = [torch.rand(boxes, 12).softmax(-1) for _ in targets]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        text = tensor.data_ptr() == branch.text_embeddings.data_ptr()
        if tensor.dim() == 2 and tensor.shape[1] == 12 and not text:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = [branch(each, soft, targets, 24.0) for each in regions]
    held = sum(kept.values())
    assert len(losses) == (4 if layers == "all" else 2)
    bound = branch_bytes(detector.section, section, boxes, 4, 12)
    if way == "boxes":
        assert held == bound
    else:  # No denoising there, and each box has its label's query.
        denoised = branch_bytes(detector.section, section, 0, 4, 12)
        assert held == bound - denoised


def test_bad_targets_are_refused(
    make_detector: Callable[..., DinoDetector],
    make_targets: Callable[..., list[Targets]],
    images: tuple[Tensor, Tensor],
) -> None:
    detector, context = make_detector(), LossContext(4.0, None)
    targets = make_targets([1, 2, 0, 1])
    with pytest.raises(DataError, match="4 images have 3 targets"):
        detector(*images, targets[:3], context)
    targets[1].labels[1] = 12
    with pytest.raises(DataError, match=r"image 1: label 12 of box 1 .* labels 0 to 11"):
        detector(*images, targets, context)
    targets[1].labels[1] = 11
    targets[3].boxes[0, 2] = torch.nan
    with pytest.raises(DataError, match="image 3: box 0 is"):
        detector(*images, targets, context)
