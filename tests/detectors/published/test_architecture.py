"""Backbones are known by the shapes of their weights."""

import pytest
import timm
import torch

from pipeline.detectors.published.architecture import infer_backbone
from pipeline.errors import DataError


@pytest.mark.parametrize("num_maps", [3, 4])
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        "swin_base_patch4_window7_224",
        "swin_base_patch4_window12_384",
        "swin_large_patch4_window7_224",
        "swin_large_patch4_window12_384",
    ],
)
def test_a_backbone_is_known_by_its_shapes(name: str, num_maps: int) -> None:
    last = 4 if name.startswith("swin") else 5
    indices = list(range(last - num_maps, last))
    with torch.device("meta"):
        body = timm.create_model(name, features_only=True, out_indices=indices)
    weights = {f"backbone.body.{key}": tensor for key, tensor in body.state_dict().items()}
    found = infer_backbone(weights, num_maps)
    assert (found.name, found.out_indices, found.weights) == (name, indices, None)


def test_another_backbone_is_refused_with_those_that_are_known() -> None:
    with torch.device("meta"):
        body = timm.create_model("resnet152", features_only=True)
    weights = {f"backbone.body.{key}": tensor for key, tensor in body.state_dict().items()}
    with pytest.raises(DataError, match=r"bottleneck \[3, 8, 36, 3\], .* resnet101"):
        infer_backbone(weights, 3)
