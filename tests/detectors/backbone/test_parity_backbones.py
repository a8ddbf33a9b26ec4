"""The authors' own detection backbones against ours, on odd sizes: weights by timm's converters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import recipe
from pipeline.detectors.backbone import Backbone

REFERENCES = Path(__file__).parents[1] / "references"

# Small random models of the public code of DINO (Swin, ConvNeXt) and RichSem (FocalNet).
MODELS: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        [1, 2],
        {"embed_dim": 8, "depths": [2, 2, 2], "num_heads": [2, 2, 4], "window_size": 4},
    ),
    "focalnet": ("small_focalnet", [1, 2], {}),
    "convnext": ("convnext_atto", [1, 2, 3], {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}),
}


@pytest.mark.parametrize("family", list(MODELS))
def test_maps_and_masks_equal_those_of_the_public_code(
    family: str, section: Callable[..., recipe.Backbone], tmp_path: Path
) -> None:
    name, indices, arguments = MODELS[family]
    if family == "convnext":
        arguments = arguments | {"conv_mlp": False}
    stored = load_file(REFERENCES / f"backbone_{family}.safetensors")
    weights = {k.removeprefix("weights."): v.float() for k, v in stored.items() if "weights." in k}
    torch.save({"model": weights}, tmp_path / "official.pth")
    backbone = Backbone(
        section(
            name,
            out_indices=indices,
            arguments=arguments,
            weights=str(tmp_path / "official.pth"),
        )
    ).eval()
    assert backbone.output_norms is not None
    for norm, index in zip(backbone.output_norms, indices, strict=True):
        norm.load_state_dict({part: weights[f"norm{index}.{part}"] for part in ("weight", "bias")})
    with torch.no_grad():
        maps = backbone(stored["image"].float(), stored["mask"])
    for place, level in enumerate(maps):
        torch.testing.assert_close(level.features, stored[f"map.{place}"], rtol=1e-4, atol=1e-5)
        assert torch.equal(level.mask, stored[f"map_mask.{place}"])
