from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline import recipe
from pipeline.detectors.backbone import Backbone, group_norm
from pipeline.errors import RecipeError


def section(name: str = "resnet10t", **changes: Any) -> recipe.Backbone:
    base: dict[str, Any] = {"name": name, "weights": None, "norm": "group", "frozen_stages": 0}
    return recipe.Backbone.model_validate(base | changes)


def test_maps_and_masks_have_the_strides_of_the_model() -> None:
    backbone = Backbone(section())
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[:, 32:] = True
    maps = backbone(torch.randn(2, 3, 64, 96), mask)
    assert [tuple(level.features.shape) for level in maps] == [
        (2, 128, 8, 12),
        (2, 256, 4, 6),
        (2, 512, 2, 3),
    ]
    for level in maps:
        height = level.features.shape[2]
        assert not level.mask[:, : height // 2].any() and level.mask[:, height // 2 :].all()


def test_maps_with_channels_last_are_turned() -> None:
    backbone = Backbone(
        section(
            "swin_tiny_patch4_window7_224",
            norm="own",
            out_indices=[1, 2],
            arguments={"img_size": 64, "embed_dim": 24, "window_size": 4},
        )
    )
    maps = backbone(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    assert [tuple(m.features.shape) for m in maps] == [(1, 48, 8, 8), (1, 96, 4, 4)]


def test_group_norm_takes_the_place_of_batch_norm() -> None:
    body = Backbone(section()).body
    kinds = [type(module) for module in body.modules()]
    assert nn.GroupNorm in kinds and not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    groups = {width: group_norm(width).num_groups for width in (256, 128, 96, 64, 48, 20, 3)}
    assert groups == {256: 32, 128: 32, 96: 16, 64: 16, 48: 8, 20: 4, 3: 1}


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"])
def test_frozen_batch_norm_neither_trains_nor_counts(name: str) -> None:
    backbone = Backbone(section(name, norm="frozen")).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool))
    for key, value in backbone.state_dict().items():
        assert torch.equal(before[key], value), key
    assert not any("bn" in name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize(
    ("name", "out_indices", "stages", "frozen"),
    [
        ("resnet10t", [2, 3, 4], 1, {"conv1", "bn1"}),
        ("resnet10t", [2, 3, 4], 2, {"conv1", "bn1", "layer1"}),
        ("test_convnext", [1, 2, 3], 1, {"stem_0", "stem_1"}),
        ("test_convnext", [1, 2, 3], 2, {"stem_0", "stem_1", "stages_0"}),
        ("resnet10t", [1, 2], 3, {"conv1", "bn1", "layer1", "layer2"}),
    ],
)
def test_leading_stages_are_frozen(
    name: str, out_indices: list[int], stages: int, frozen: set[str]
) -> None:
    body = Backbone(section(name, out_indices=out_indices, frozen_stages=stages)).body
    still = {key.split(".")[0] for key, p in body.named_parameters() if not p.requires_grad}
    moving = {key.split(".")[0] for key, p in body.named_parameters() if p.requires_grad}
    assert still == frozen and not still & moving


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_local_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    donor = timm.create_model("resnet10t", pretrained=False)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(donor.state_dict(), path)
    else:
        save_file(donor.state_dict(), path)
    backbone = Backbone(section(weights=str(path)))
    state = backbone.body.state_dict()
    assert torch.equal(state["layer3.0.conv1.weight"], donor.state_dict()["layer3.0.conv1.weight"])
    other = Backbone(section(weights=str(path)), pretrained=False).body.state_dict()
    assert not torch.equal(other["layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])


def test_wrong_requests_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a file"):
        Backbone(section(weights=str(tmp_path / "absent.pth")))
    strange = tmp_path / "strange.safetensors"
    save_file({"a": torch.zeros(1)}, strange)
    with pytest.raises(RecipeError, match="lacks"):
        Backbone(section(weights=str(strange)))
    with pytest.raises(RecipeError, match="no_such_model"):
        Backbone(section("no_such_model"))
    with pytest.raises(RecipeError, match="out_indices"):
        Backbone(section(out_indices=[2, 9]))
    with pytest.raises(RecipeError, match="frozen_stages is 7"):
        Backbone(section(frozen_stages=7))
