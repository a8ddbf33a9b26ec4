"""The smallest member of each family through the whole detector, on an odd size."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from pipeline import recipe
from pipeline.data.batch import Targets
from pipeline.detectors.backbone import Backbone
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.interface import LossContext, TrainingOutput

SMALLEST: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"norm": "frozen"}),
    "swin": ("swin_tiny_patch4_window7_224", {"out_indices": [1, 2, 3]}),
    "swin_v2": ("swinv2_tiny_window8_256", {"out_indices": [1, 2, 3]}),
    "convnext": ("convnext_atto", {"out_indices": [1, 2, 3]}),
    "convnext_v2": ("convnextv2_atto", {"out_indices": [1, 2, 3]}),
    "focalnet": ("focalnet_tiny_srf", {"out_indices": [1, 2, 3]}),
    "vit": ("vit_tiny_patch16_224", {"out_indices": [1, 2, 3]}),
    "eva02": ("eva02_tiny_patch14_224", {"out_indices": [1, 2, 3]}),
    "dinov3": ("vit_small_patch16_dinov3", {"out_indices": [1, 2, 3]}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"out_indices": [1, 2, 3]}),
}


@pytest.mark.parametrize("family", list(SMALLEST))
def test_every_trainable_parameter_of_the_detector_gets_a_gradient(
    family: str,
    make_detector: Callable[..., DinoDetector],
    make_targets: Callable[..., list[Targets]],
) -> None:
    name, changes = SMALLEST[family]
    base = {"name": name, "weights": None, "norm": "own", "frozen_stages": 1, "window_size": None}
    if "vit" in name or "eva" in name:
        base["window_size"] = 3
    detector = make_detector(backbone=base | changes).train()
    images = torch.randn(2, 3, 70, 101)
    mask = torch.zeros(2, 70, 101, dtype=torch.bool)
    mask[1, :, 40:] = True
    maps = detector.backbone(images, mask)
    assert [level.features.shape[1] for level in maps] == detector.backbone.channels
    for finer, coarser in pairwise(maps):
        height, width = finer.features.shape[2:]
        assert tuple(coarser.features.shape[2:]) in {
            (height // 2, width // 2),
            (-(-height // 2), -(-width // 2)),
        }
    for level in maps:
        assert level.mask.shape == level.features.shape[:1] + level.features.shape[2:]
        assert not level.mask[0].any() and level.mask[1].any()
    output = detector(images, mask, make_targets([1, 2]), LossContext(3.0, None))
    assert isinstance(output, TrainingOutput)
    loss = torch.stack(list(output.losses.values())).sum()
    assert loss.isfinite()
    loss.backward()
    lost = [key for key, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [key for key, p in detector.named_parameters() if not p.requires_grad]
    assert not lost and frozen
    assert all(key.startswith("backbone.body.") for key in frozen)


def test_padding_does_not_make_the_gradients_of_a_fresh_focalnet_explode() -> None:
    """Nothing varies in padding, so a layer norm divides by next to nothing, block after block."""
    torch.manual_seed(0)
    section = recipe.Backbone(
        name="focalnet_tiny_srf", weights=None, norm="own", out_indices=[1, 2, 3], frozen_stages=0
    )
    backbone = Backbone(section)
    images, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    images[1, :, :, 32:], mask[1, :, 32:] = 0, True
    sum(level.features.pow(3).mean() for level in backbone(images, mask)).backward()
    assert all(p.grad is None or p.grad.abs().max() < 100 for p in backbone.parameters())
