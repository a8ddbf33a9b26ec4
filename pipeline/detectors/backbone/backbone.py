"""The backbone module: images to feature maps, with its frozen part and its learning rates."""

from typing import NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureInfo, FeatureListNet
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline import recipe
from pipeline.detectors.backbone.create import create_body, patch_size
from pipeline.detectors.backbone.depth import (
    Stage,
    num_layers,
    places,
    stages_of_pyramid,
    stages_of_vit,
)
from pipeline.detectors.backbone.maps import (
    ChannelNorm,
    FeatureMap,
    pad_to_multiple,
    resize_mask,
)
from pipeline.detectors.backbone.norms import freeze_norms, has_batch_norm, replace_norms
from pipeline.detectors.backbone.pyramid import CHANNELS, LEVELS, SimplePyramid
from pipeline.detectors.backbone.vit import Windows, evenly_spaced, run_vit
from pipeline.errors import RecipeError

# Tables of positions and single tokens: decay would pull them to zero, which means nothing there.
UNDECAYED = (
    "pos_embed",
    "cls_token",
    "reg_token",
    "dist_token",
    "relative_position_bias_table",
    "freqs",
    "logit_scale",
)
VITDET_WINDOW, VITDET_GLOBAL = 14, 4


class ParameterRule(NamedTuple):
    """How a parameter trains: the factor of its learning rate, and whether weights decay."""

    rate: float
    decayed: bool


class Backbone(nn.Module):
    """Feature maps of a timm model, and the pixel statistics that its weights were trained with.

    `body` is timm's module with timm's names; a plain ViT is followed by `pyramid`, other families
    without batch norm by `output_norms`. `pretrained=False` skips the weights of the recipe, for a
    model whose weights are loaded next. Raises `RecipeError` for options that do not fit the model.
    """

    def __init__(self, section: recipe.Backbone, *, pretrained: bool = True) -> None:
        super().__init__()
        self.section = section
        body = create_body(section, section.weights if pretrained else None)
        config = getattr(body, "pretrained_cfg", None) or {}
        self.pixel_mean = _three(config.get("mean") or IMAGENET_DEFAULT_MEAN)
        self.pixel_std = _three(config.get("std") or IMAGENET_DEFAULT_STD)
        self.pyramid: SimplePyramid | None = None
        self.output_norms: nn.ModuleList | None = None
        plain = False
        if isinstance(body, VisionTransformer | Eva):
            plain = True
            stages = stages_of_vit(len(body.blocks))
            self._windows = _windows(section, len(body.blocks))
            self.pyramid = _pyramid(section, body.embed_dim)
            self.channels = [CHANNELS] * len(section.out_indices)
        else:
            stages = stages_of_pyramid(body)
            self.channels = _feature_channels(body)
        normed = not plain and not has_batch_norm(body)
        if normed if section.output_norm is None else section.output_norm:
            eps = _norm_eps(body)
            self.output_norms = nn.ModuleList(ChannelNorm(width, eps) for width in self.channels)
        self._multiple = 1 if plain else patch_size(body)
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
        self.body = _with_norms(body, section)
        self._places = places(self.body, stages)
        self._num_layers = num_layers(stages)
        self._freeze(len(stages))
        self._checkpointed = self._checkpointed_modules(stages)

    def forward(self, images: Tensor, mask: Tensor) -> list[FeatureMap]:
        """Maps of (B, 3, H, W) float images of any size, finest first."""
        maps = self._maps(images)
        if self.output_norms is not None:
            maps = [norm(x) for norm, x in zip(self.output_norms, maps, strict=True)]
        return [FeatureMap(x, resize_mask(mask, (x.shape[2], x.shape[3]))) for x in maps]

    def parameter_rules(self) -> dict[str, ParameterRule]:
        """How each parameter trains, by its name here.

        The learning rate falls by `layer_decay` from block to block (Bao et al. 2021): a body of n
        blocks gives its k-th block, counted from 1, layer_decay ** (n + 1 - k), the stem k = 0, and
        what follows the body 1.
        """
        rules = {}
        for name, parameter in self.named_parameters():
            place = self._places.get(name.removeprefix("body."))
            after = 0 if place is None else self._num_layers + 1 - place.layer
            decayed = parameter.ndim > 1 and not name.endswith(UNDECAYED)
            rules[name] = ParameterRule(self.section.layer_decay**after, decayed)
        return rules

    def _maps(self, images: Tensor) -> list[Tensor]:
        if self.pyramid is not None:
            assert isinstance(self.body, VisionTransformer | Eva)
            maps: list[Tensor] = self.pyramid(
                run_vit(self.body, images, self._windows, self._checkpointed_blocks())
            )
            return maps
        images = pad_to_multiple(images, self._multiple)
        maps = self._run_stages(images) if self._checkpointed else self.body(images)
        return [x.permute(0, 3, 1, 2) for x in maps] if self._channels_last else maps

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        """What timm's feature network does, with the blocks of some stages computed again."""
        assert isinstance(self.body, FeatureListNet)
        maps = []
        for name, module in self.body.items():
            if name not in self._checkpointed:
                x = module(x)
            elif isinstance(module, nn.Sequential):
                for block in module:
                    x = _run(block, x)
            else:
                module.grad_checkpointing = torch.is_grad_enabled()
                x = module(x)
            if name in self.body.return_layers:
                maps.append(x)
        return maps

    def _checkpointed_blocks(self) -> frozenset[int]:
        return frozenset(int(name.removeprefix("blocks.")) for name in self._checkpointed)

    def _checkpointed_modules(self, stages: list[Stage]) -> frozenset[str]:
        """Names of the stages, of a ViT of its blocks, whose activations are not kept."""
        count, name = self.section.checkpointed_stages, self.section.name
        if count == 0:
            return frozenset()
        if count > len(stages):
            raise RecipeError(
                f"detector.backbone.checkpointed_stages is {count}, but {name} has {len(stages)} "
                "stages up to its last map, the stem not counted"
            )
        chosen = frozenset(module for stage in stages[:count] for module in stage.modules)
        modules = dict(self.body.named_modules())
        able = self.pyramid is not None or (
            isinstance(self.body, FeatureListNet)
            and all(
                isinstance(modules[module], nn.Sequential)
                or hasattr(modules[module], "grad_checkpointing")
                for module in chosen
            )
        )
        if not able:
            raise RecipeError(
                f"detector.backbone.checkpointed_stages is {count}, and timm's {name} does not run "
                "stage by stage; set it to 0"
            )
        if has_batch_norm(self.body):
            raise RecipeError(
                f"detector.backbone.checkpointed_stages is {count} with norm own: a batch norm "
                "that is computed twice counts its statistics twice; set norm to frozen or group"
            )
        return chosen

    def _freeze(self, num_stages: int) -> None:
        count = self.section.frozen_stages
        if count > num_stages + 1:
            raise RecipeError(
                f"detector.backbone.frozen_stages is {count}, but {self.section.name} has "
                f"{num_stages + 1} stages up to its last map, the stem included"
            )
        for name, parameter in self.body.named_parameters():
            if self._places[name].stage < count:
                parameter.requires_grad_(False)


def _run(block: nn.Module, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        output = block(x)
    else:
        output = checkpoint(block, x, use_reentrant=False)
    assert isinstance(output, Tensor)
    return output


def _feature_channels(body: nn.Module) -> list[int]:
    info = body.feature_info
    assert isinstance(info, FeatureInfo)
    channels: list[int] = info.channels()
    return channels


def _with_norms(body: nn.Module, section: recipe.Backbone) -> nn.Module:
    if section.norm == "frozen":
        return freeze_norms(body)
    if section.norm == "group":
        if not has_batch_norm(body):
            raise RecipeError(
                f"detector.backbone.norm is group, and {section.name} has no batch norm to "
                "replace; set norm to own"
            )
        replace_norms(body)
    return body


def _norm_eps(body: nn.Module) -> float:
    """That of the model's own layer norms, for the family's detectors use it for their outputs."""
    found = [module.eps for module in body.modules() if isinstance(module, nn.LayerNorm)]
    return found[0] if found else 1e-6


def _windows(section: recipe.Backbone, num_blocks: int) -> Windows:
    wanted = VITDET_GLOBAL if section.global_blocks is None else section.global_blocks
    if wanted > num_blocks:
        raise RecipeError(
            f"detector.backbone.global_blocks is {wanted}, but {section.name} has {num_blocks} "
            "blocks; choose no more than those"
        )
    return Windows(section.window_size or VITDET_WINDOW, evenly_spaced(num_blocks, wanted))


def _pyramid(section: recipe.Backbone, dim: int) -> SimplePyramid:
    beyond = [index for index in section.out_indices if index >= LEVELS]
    if beyond:
        raise RecipeError(
            f"detector.backbone.out_indices {section.out_indices} has {beyond[0]}, but the pyramid "
            f"of a plain ViT has {LEVELS} maps, 0 to {LEVELS - 1} (strides 4, 8, 16 and 32 for "
            "patches of 16); DINO with four levels takes [1, 2, 3]"
        )
    return SimplePyramid(dim, section.out_indices)


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
