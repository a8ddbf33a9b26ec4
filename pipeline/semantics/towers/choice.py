"""Which way of reading regions a tower has, told from its config alone, and its reader."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from pipeline.errors import RecipeError
from pipeline.recipe import Teacher
from pipeline.semantics.towers import RegionReader
from pipeline.semantics.towers.convnext import ConvNextRegions
from pipeline.semantics.towers.crops import CropRegions
from pipeline.semantics.towers.resnet import ResNetRegions
from pipeline.semantics.towers.siglip import SiglipRegions
from pipeline.semantics.towers.vit import VitRegions

Kind = Literal["resnet", "vit of a class token", "vit of a mean", "siglip", "convnext", "other"]
_DENSE: dict[str, Callable[..., RegionReader]] = {
    "resnet": ResNetRegions,
    "vit of a class token": VitRegions,
    "vit of a mean": VitRegions,
    "siglip": SiglipRegions,
    "convnext": ConvNextRegions,
}
_HOW = {
    "resnet": "RoIAlign on the last map, then the attention pool",
    "vit of a class token": "means of the last block's values (ClearCLIP)",
    "vit of a mean": "means of the last map",
    "siglip": "RoIAlign on the last map, then the attention pool",
    "convnext": "means of the last map, then the head",
}
_CHANGED_BLOCKS = {
    "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn",
    "scale_fc",
}  # fmt: skip


def tower_kind(config: Mapping[str, Any]) -> Kind:
    """What an open_clip model's image tower is, by its config."""
    vision = config["vision_cfg"]
    name = vision.get("timm_model_name")
    if name is not None:
        if name.startswith("convnext"):
            return "convnext"
        # Others with such a pool have a class token or rotary positions.
        siglip = name.startswith("vit_") and "siglip" in name and vision.get("timm_pool") == "map"
        return "siglip" if siglip else "other"
    if isinstance(vision.get("layers"), list):
        return "resnet"
    if vision.get("attentional_pool") or any(vision.get(key) for key in _CHANGED_BLOCKS):
        return "other"
    return "vit of a mean" if vision.get("pool_type") == "avg" else "vit of a class token"


def regions_of(section: Teacher, config: Mapping[str, Any]) -> Literal["dense", "crops"]:
    """How the regions of this teacher are read.

    `auto` reads maps of convolutional towers, and crops with all others: each token of a ViT
    gathers from the whole image, and CLIPSelf (Wu et al., ICLR 2024, figure 2) measures that maps
    of CLIP's ViTs tell boxes far worse than crops of them do. Raises `RecipeError` for a way that
    the tower does not have, and for a scale that would have no effect.
    """
    kind = tower_kind(config)
    if section.regions == "dense" and kind == "other":
        raise RecipeError(
            f"teacher.regions is dense, and no map of teacher.model {section.model!r} can be read "
            "by regions here; set teacher.regions to crops or auto"
        )
    if section.regions != "auto":
        chosen = section.regions
    else:
        chosen = "dense" if kind in ("resnet", "convnext") else "crops"
    if chosen == "crops" and section.image_scale != 1:
        raise RecipeError(
            f"teacher.image_scale is {section.image_scale:g}, and teacher.model {section.model!r} "
            "reads crops of the size that it was trained with, so a scale has no effect; set it to "
            "1, or teacher.regions to dense"
        )
    return chosen


def describe_regions(section: Teacher, config: Mapping[str, Any]) -> str:
    """One line for logs: how regions are read, and that it was chosen where it was."""
    chosen = regions_of(section, config)
    how = "each box cut out and resized to {} x {}".format(*image_size(config))
    if chosen == "dense":
        how = _HOW[tower_kind(config)]
    why = ", chosen for this tower" if section.regions == "auto" else ""
    return f"regions {chosen}{why}: {how}"


def region_reader(section: Teacher, config: Mapping[str, Any], visual: nn.Module) -> RegionReader:
    """The reader of `visual`, the tower that `config` describes; raises as `regions_of`."""
    if regions_of(section, config) == "crops":
        return CropRegions(visual, image_size(config))
    return _DENSE[tower_kind(config)](visual, section.image_scale)


def image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the images that the tower was trained with."""
    size = config["vision_cfg"].get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])
