"""The backbone: any timm model that gives feature maps, with its normalisation and frozen part."""

import math
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from pipeline import recipe
from pipeline.errors import RecipeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureMap(NamedTuple):
    """A level: `features` (B, C, h, w) and `mask` (B, h, w), True on padding."""

    features: Tensor
    mask: Tensor


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer where a group would have under four channels.

    Fewer channels make a group's statistics depend on a handful of values on small maps.
    """
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W) bool to (B, *size), by the nearest pixel as in DETR."""
    return F.interpolate(mask[None].float(), size=size)[0].to(torch.bool)


class Backbone(nn.Module):
    """Feature maps of a timm model, and the pixel statistics that its weights were trained with.

    `pretrained=False` skips the weights of the recipe, for a model whose weights are loaded next.
    """

    def __init__(self, section: recipe.Backbone, *, pretrained: bool = True) -> None:
        super().__init__()
        self.body = _create(section, section.weights if pretrained else None)
        self.channels: list[int] = _feature_info(self.body).channels()
        config = getattr(self.body, "pretrained_cfg", None) or {}
        self.pixel_mean = _three(config.get("mean", IMAGENET_MEAN))
        self.pixel_std = _three(config.get("std", IMAGENET_STD))
        self._channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        if section.norm == "frozen":
            self.body = freeze_batch_norm_2d(self.body)
        elif section.norm == "group":
            _replace_batch_norm(self.body)
        _freeze_stages(self.body, section)

    def forward(self, images: Tensor, mask: Tensor) -> list[FeatureMap]:
        """Maps of (B, 3, H, W) float images, finest first."""
        maps = self.body(images)
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return [FeatureMap(x, resize_mask(mask, (x.shape[2], x.shape[3]))) for x in maps]


def _feature_info(body: nn.Module) -> FeatureInfo:
    info = body.feature_info
    assert isinstance(info, FeatureInfo)
    return info


def _create(section: recipe.Backbone, weights: str | None) -> nn.Module:
    options: dict[str, object] = dict(section.arguments)
    if weights is not None and weights != "pretrained":
        _check_file(Path(weights), section.name)
        options["pretrained_cfg_overlay"] = {"file": weights}
    try:
        body = timm.create_model(
            section.name,
            pretrained=weights is not None,
            features_only=True,
            out_indices=tuple(section.out_indices),
            **options,
        )
    except (RuntimeError, TypeError, AssertionError, IndexError, ValueError) as error:
        raise RecipeError(
            f"detector.backbone {section.name!r} with weights {weights!r}, out_indices "
            f"{section.out_indices} and arguments {section.arguments} cannot be made: {error}; "
            "choose a timm model that gives feature maps, and arguments that it takes"
        ) from error
    assert isinstance(body, nn.Module)
    if isinstance(weights, str) and weights != "pretrained":
        _check_names(body, Path(weights))
    return body


def _check_file(path: Path, name: str) -> None:
    if not path.is_file():
        raise RecipeError(
            f"detector.backbone.weights {str(path)!r} is not a file; give a safetensors or PyTorch "
            f"file with timm's weights of {name}, `pretrained`, or null"
        )


def _check_names(body: nn.Module, path: Path) -> None:
    """timm loads what fits and drops the rest in silence; refuse a file that is another model's."""
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state.get("model", state))
    shapes = {key.replace(".", "_"): tuple(value.shape) for key, value in state.items()}
    missing = [
        name
        for name, parameter in body.named_parameters()
        if shapes.get(name.replace(".", "_")) != tuple(parameter.shape)
    ]
    if missing:
        raise RecipeError(
            f"detector.backbone.weights {str(path)!r} lacks {len(missing)} tensors of the backbone "
            f"or has them in another shape (first: {missing[0]}); give the file of the same model"
        )


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _replace_batch_norm(module: nn.Module) -> None:
    """Put GroupNorm in the place of each BatchNorm, with its activation and affine weights."""
    for name, child in module.named_children():
        _replace_batch_norm(child)
        if not isinstance(child, nn.BatchNorm2d):
            continue
        norm = group_norm(child.num_features)
        if child.affine:
            norm.weight.data.copy_(child.weight.data)
            norm.bias.data.copy_(child.bias.data)
        # timm's BatchNormAct2d applies dropout and an activation of its own after the norm.
        after = [getattr(child, part, None) for part in ("drop", "act")]
        setattr(module, name, nn.Sequential(norm, *(part for part in after if part is not None)))


def _freeze_stages(body: nn.Module, section: recipe.Backbone) -> None:
    """Freeze the stem and the stages after it, `frozen_stages` in all."""
    if section.frozen_stages == 0:
        return
    parameters = list(body.named_parameters())
    starts: list[int] = []
    for info in _feature_info(body).info:
        prefixes = (f"{info['module']}.", f"{info['module'].replace('.', '_')}.")
        inside = [i for i, (name, _) in enumerate(parameters) if name.startswith(prefixes)]
        if inside:
            starts.append(inside[0])
    ends = [*starts, len(parameters)]
    if section.frozen_stages > len(ends):
        raise RecipeError(
            f"detector.backbone.frozen_stages is {section.frozen_stages}, but {section.name} has "
            f"{len(ends)} stages up to its last map, the stem included"
        )
    for _, parameter in parameters[: ends[section.frozen_stages - 1]]:
        parameter.requires_grad_(False)
