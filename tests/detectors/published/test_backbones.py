"""Backbones of public detectors: their names, and the features that torchvision gives."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pipeline import recipe
from pipeline.detectors.backbone import Backbone
from pipeline.detectors.published import convert
from pipeline.detectors.published.backbones import backbone_name, drop_reason

BODY = "backbone.body."
REFERENCES = Path(__file__).parents[1] / "references"


def trained_looking(model: nn.Module) -> dict[str, Tensor]:
    """Random weights and statistics that keep features near one in size."""
    generator = torch.Generator().manual_seed(0)

    def near(value: float, spread: float, like: Tensor) -> Tensor:
        return value + spread * torch.randn(like.shape, generator=generator)

    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.endswith("running_var"):
            state[name] = 1 + torch.rand(tensor.shape, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            state[name] = near(0.0, 0.1, tensor)
        elif tensor.dim() == 1:
            state[name] = near(0.3 if "bn3" in name else 1.0, 0.1, tensor)
    return state


@pytest.mark.parametrize("depth", [50, 101])
def test_a_resnet_gives_torchvisions_features(depth: int) -> None:
    """DINO runs torchvision's ResNet with frozen batch norm (eps 1e-5)."""
    theirs = getattr(torchvision.models, f"resnet{depth}")(norm_layer=FrozenBatchNorm2d).eval()
    state = trained_looking(theirs)
    theirs.load_state_dict(state)
    named = {f"backbone.0.body.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    converted = convert("dino", named)
    assert converted.names.keys() == converted.weights.keys()
    assert set(converted.names.values()) == named.keys()
    ours = Backbone(recipe.Backbone(name=f"resnet{depth}"), pretrained=False).eval()
    weights = {k.removeprefix("backbone."): v for k, v in converted.weights.items()}
    ours.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 96, 70, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = ours(images, torch.zeros(2, 96, 70, dtype=torch.bool))
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        x = theirs.layer1(x)
        for found, layer in zip(maps, (theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
            x = layer(x)
            assert 0.1 < float(x.std()) < 10
            torch.testing.assert_close(found.features, x, atol=1e-4, rtol=0)


def test_a_swin_gives_the_public_detectors_maps() -> None:
    """Maps of the official Swin of detection code, of stages 1 and 2, on an image of odd sides."""
    reference = load_file(REFERENCES / "backbone_swin.safetensors")
    named = {
        f"backbone.0.{name.removeprefix('weights.')}": tensor.float()
        for name, tensor in reference.items()
        if name.startswith("weights.")
    }
    tables = {
        "backbone.0.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16),
        "backbone.0.layers.1.blocks.1.attn_mask": torch.zeros(1),
    }
    converted = convert("dino", named | tables)
    assert converted.dropped.keys() == tables.keys()
    assert set(converted.names.values()) == named.keys()
    section = recipe.Backbone.model_validate(
        {
            "name": "swin_tiny_patch4_window7_224",
            "out_indices": [1, 2],
            "arguments": {
                "embed_dim": 8,
                "depths": [2, 2, 2],
                "num_heads": [2, 2, 4],
                "window_size": 4,
            },
        }
    )
    ours = Backbone(section, pretrained=False).eval()
    ours.load_state_dict(
        {name.removeprefix("backbone."): tensor for name, tensor in converted.weights.items()},
        strict=True,
    )
    with torch.no_grad():
        maps = ours(reference["image"].float(), reference["mask"])
    for number, found in enumerate(maps):
        torch.testing.assert_close(found.features, reference[f"map.{number}"], atol=1e-4, rtol=0)


def test_pixels_are_scaled_as_public_detectors_do() -> None:
    """RGB; detrex's mean and deviation of 0 to 255 are ImageNet's of 0 to 1, which DINO has."""
    backbone = Backbone(recipe.Backbone(name="resnet50"), pretrained=False)
    detrex = torch.tensor([[123.675, 116.280, 103.530], [58.395, 57.120, 57.375]]) / 255
    ours = torch.tensor([backbone.pixel_mean, backbone.pixel_std])
    torch.testing.assert_close(ours, detrex, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.0.body.conv1.weight", "conv1.weight"),
        ("backbone.0.body.bn1.running_var", "bn1.running_var"),
        ("backbone.0.body.layer3.5.bn2.bias", "layer3.5.bn2.bias"),
        (
            "backbone.0.body.layer4.0.downsample.1.running_mean",
            "layer4.0.downsample.1.running_mean",
        ),
        ("backbone.stem.conv1.weight", "conv1.weight"),
        ("backbone.stem.conv1.norm.weight", "bn1.weight"),
        ("backbone.res2.0.conv1.norm.weight", "layer1.0.bn1.weight"),
        ("backbone.res5.2.conv3.weight", "layer4.2.conv3.weight"),
        ("backbone.res4.0.shortcut.weight", "layer3.0.downsample.0.weight"),
        ("backbone.res4.0.shortcut.norm.running_var", "layer3.0.downsample.1.running_var"),
        ("backbone.0.patch_embed.norm.bias", "patch_embed.norm.bias"),
        ("backbone.layers.2.blocks.17.attn.qkv.weight", "layers_2.blocks.17.attn.qkv.weight"),
        ("backbone.0.layers.0.downsample.reduction.weight", "layers_1.downsample.reduction.weight"),
    ],
)
def test_names(theirs: str, ours: str) -> None:
    assert backbone_name(theirs) == BODY + ours
    assert drop_reason(theirs) is None


@pytest.mark.parametrize(
    "name",
    [
        "transformer.level_embed",
        "backbone.0.body.layer5.0.conv1.weight",
        "backbone.res2.0.conv4.weight",
        "backbone.net.blocks.0.attn.qkv.weight",
        "conv1.weight",
    ],
)
def test_other_names_are_nobodys(name: str) -> None:
    assert backbone_name(name) is None
