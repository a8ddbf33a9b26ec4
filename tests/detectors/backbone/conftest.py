"""Backbone sections with random weights, all of which train."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
from timm.models.focalnet import FocalNet, _create_focalnet

from pipeline import recipe

# timm fixes the sizes of its FocalNets; this one is small, with the options of the largest.
SMALL_FOCALNET = "small_focalnet"


def small_focalnet(pretrained: bool = False, **options: Any) -> FocalNet:
    """Three stages of 8, 16 and 32 channels with the options of FocalNet-Huge."""
    return _create_focalnet(
        SMALL_FOCALNET,
        pretrained,
        depths=(1, 1, 2),
        embed_dim=8,
        focal_levels=(3, 3, 3),
        focal_windows=(3, 3, 3),
        use_post_norm=True,
        use_post_norm_in_modulation=True,
        use_overlap_down=True,
        layerscale_value=1e-4,
        **options,
    )


timm.models.register_model(small_focalnet)


@pytest.fixture
def section() -> Callable[..., recipe.Backbone]:
    """The section of a small ResNet, or of another model, with changes."""

    def make(name: str = "resnet10t", **changes: Any) -> recipe.Backbone:
        norm = "group" if name.startswith("resnet") else "own"
        base: dict[str, Any] = {"name": name, "weights": None, "norm": norm, "frozen_stages": 0}
        return recipe.Backbone.model_validate(base | changes)

    return make
