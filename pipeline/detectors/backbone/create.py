"""Making the body: a timm feature network, or a plain ViT without its head."""

import difflib
from typing import Any

import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.models.eva import Eva
from timm.models.focalnet import Downsample
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline import recipe
from pipeline.detectors.backbone.swin import pad_before_shifting
from pipeline.detectors.backbone.weights import load_weights
from pipeline.errors import RecipeError, StorageError

VIT_MODULES = ("timm.models.vision_transformer", "timm.models.eva", "timm.models.deit")
SET_HERE = {
    "pretrained": "is decided by detector.backbone.weights",
    "checkpoint_path": "is given in detector.backbone.weights",
    "out_indices": "has a key of its own, detector.backbone.out_indices",
    "drop_path_rate": "has a key of its own, detector.backbone.drop_path",
    "features_only": "is set by the detector",
    "in_chans": "is set by the detector, whose images have 3 channels",
}
SWIN_MODULES = ("timm.models.swin_transformer", "timm.models.swin_transformer_v2")


def create_body(section: recipe.Backbone, weights: str | None) -> nn.Module:
    """The body of the recipe with its weights.

    It is a timm feature network, or a `VisionTransformer` or `Eva` whose head and last norm are
    cut off. Raises `RecipeError` for what timm does not know or the model does not take.
    """
    module = _module_of(section.name)
    options: dict[str, Any] = {"drop_path_rate": section.drop_path} | section.arguments
    if module in SWIN_MODULES:
        # Any input size: windows of the trained size, with padding, however small the map.
        options = {"strict_img_size": False, "always_partition": True} | options
    plain = module in VIT_MODULES
    _refuse_foreign_options(section, plain)
    if plain:
        options = {"dynamic_img_size": True} | options
    else:
        options |= {"features_only": True, "out_indices": tuple(section.out_indices)}
    body = _create(section, weights == "pretrained", options)
    if isinstance(body, VisionTransformer | Eva):
        body.prune_intermediate_layers([len(body.blocks) - 1], prune_norm=True)
    elif plain or isinstance(body, FeatureGetterNet):
        raise RecipeError(
            f"detector.backbone.name {section.name!r} is a {_class_name(body)}, which gives maps "
            "of one size and takes no windows; the plain transformers that are supported are those "
            "of timm's classes VisionTransformer and Eva (vit_*, deit3_*, eva02_*, vit_*_dinov3)"
        )
    pad_before_shifting(body)
    if weights is None:
        _start_stem_bias(body)
    elif weights != "pretrained":
        full = _full_on_meta(section, options)
        load_weights(body, full, weights, section.name)
    return body


def _start_stem_bias(body: nn.Module) -> None:
    """Give a FocalNet's stem the random bias of a PyTorch convolution, where timm begins with 0.

    Without it padding, which is 0, stays exactly 0 through all blocks, and each layer norm of a
    cell without variance multiplies its gradient by 1 / sqrt(eps), until it overflows.
    """
    stem = getattr(body, "stem", None)
    if isinstance(stem, Downsample) and stem.proj.bias is not None:
        bound = stem.proj.weight[0].numel() ** -0.5
        nn.init.uniform_(stem.proj.bias, -bound, bound)


def patch_size(body: nn.Module) -> int:
    """What the height and width of images must be multiples of, 1 where convolutions round.

    The published detectors on Swin and FocalNet pad images to whole patches of their stems.
    """
    embedding, stem = getattr(body, "patch_embed", None), getattr(body, "stem", None)
    if embedding is not None:
        return int(embedding.patch_size[0])
    return int(stem.stride) if isinstance(stem, Downsample) else 1


def _create(section: recipe.Backbone, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        try:
            body = timm.create_model(section.name, pretrained=pretrained, **options)
        except TypeError as error:
            # Without stochastic depth a model need not know it.
            if section.drop_path or "drop_path_rate" not in str(error):
                raise
            options.pop("drop_path_rate")
            body = timm.create_model(section.name, pretrained=pretrained, **options)
    except (
        RuntimeError,
        TypeError,
        AssertionError,
        LookupError,
        ValueError,
        AttributeError,
    ) as error:
        raise RecipeError(
            f"detector.backbone {section.name!r} with weights {section.weights!r}, out_indices "
            f"{section.out_indices}, drop_path {section.drop_path:g} and arguments "
            f"{section.arguments} cannot be made: {_reason(error, section)}; choose a timm model "
            "that gives feature maps, maps that it has, and arguments that it takes"
        ) from error
    except OSError as error:
        raise StorageError(
            f"timm's weights of detector.backbone.name {section.name!r} cannot be had from the "
            f"hub: {error}; give a local file in detector.backbone.weights, or a cache in "
            "HF_HOME that holds them"
        ) from error
    assert isinstance(body, nn.Module)
    return body


def _reason(error: Exception, section: recipe.Backbone) -> str:
    if isinstance(error, IndexError):
        return f"it has no map {max(section.out_indices)}"
    return str(error) or type(error).__name__


def _full_on_meta(section: recipe.Backbone, options: dict[str, Any]) -> nn.Module:
    """The whole classifier without memory: what timm's converters of checkpoints look at."""
    whole = {k: v for k, v in options.items() if k not in ("features_only", "out_indices")}
    with torch.device("meta"):
        return timm.create_model(section.name, pretrained=False, **whole)


def _module_of(name: str) -> str:
    """The module of timm that makes the model; an unknown name is refused with the nearest ones."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        if "/" in name or ":" in name:
            hint = "a hub's address belongs to detector.backbone.weights, the model's name here"
        else:
            hint = f"the nearest are {', '.join(near)}" if near else "`timm.list_models()` has all"
        raise RecipeError(
            f"detector.backbone.name {name!r} is no model of timm {timm.__version__}; {hint}"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise RecipeError(
            f"detector.backbone.name {name!r} has the tag {tag!r}, and timm {timm.__version__} "
            f"knows of {architecture} only: {', '.join(tags) or 'none'}"
        )
    return str(timm.models.model_entrypoint(architecture).__module__)


def _refuse_foreign_options(section: recipe.Backbone, plain: bool) -> None:
    for key in section.arguments.keys() & SET_HERE.keys():
        raise RecipeError(
            f"detector.backbone.arguments has {key}, which {SET_HERE[key]}; leave it out there"
        )
    windows = {"window_size": section.window_size, "global_blocks": section.global_blocks}
    given = [name for name, value in windows.items() if value is not None]
    if given and not plain:
        raise RecipeError(
            f"detector.backbone.{given[0]} is {windows[given[0]]}, and {section.name} is no plain "
            "ViT; leave it out (the windows of Swin are its own: arguments.window_size)"
        )
    foreign = [key for key in ("dynamic_img_size", "patch_drop_rate") if section.arguments.get(key)]
    if plain and foreign:
        raise RecipeError(
            f"detector.backbone.arguments has {foreign[0]}, which a detector's ViT does not take: "
            "its size is always dynamic, and a map needs all its patches; leave it out"
        )


def _class_name(body: nn.Module) -> str:
    inner = getattr(body, "model", body)
    return type(inner).__name__
