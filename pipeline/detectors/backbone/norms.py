"""Norms of a body: frozen and folded into the convolutions before them, or replaced by groups."""

from itertools import pairwise

import torch
from timm.layers import freeze_batch_norm_2d
from timm.models import FeatureListNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pipeline.detectors.backbone.maps import group_norm

# In these, a norm that is registered right after a convolution is applied to its output alone.
IN_ORDER = (BasicBlock, Bottleneck, nn.Sequential, FeatureListNet)


class FoldedConvolution(nn.Conv2d):
    """A convolution that applies the frozen batch norm after it: by its weight, not by a pass over
    the map.

    The norm keeps its statistics under its own name; the weight stays as it was trained.
    """

    # In a tuple, or torch would register the norm a second time, as a child.
    norms: tuple[FrozenBatchNorm2d]

    def forward(self, input: Tensor) -> Tensor:
        (norm,) = self.norms
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        return self._conv_forward(input, self.weight * scale[:, None, None, None], bias)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm that the convolution before it has applied already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def has_batch_norm(body: nn.Module) -> bool:
    """Whether the body has batch norms that train or could."""
    return any(isinstance(module, nn.BatchNorm2d) for module in body.modules())


def freeze_norms(body: nn.Module) -> nn.Module:
    """The body with the statistics and weights of its batch norms frozen, as buffers."""
    frozen = freeze_batch_norm_2d(body)
    assert isinstance(frozen, nn.Module)
    fold_norms(frozen)
    return frozen


def fold_norms(body: nn.Module) -> None:
    """Let convolutions apply the frozen norms that follow them directly; no name changes."""
    for parent in body.modules():
        if not isinstance(parent, IN_ORDER):
            continue
        for convolution, norm in pairwise(parent.children()):
            if type(convolution) is nn.Conv2d and type(norm) is FrozenBatchNorm2d:
                convolution.__class__ = FoldedConvolution
                object.__setattr__(convolution, "norms", (norm,))
                norm.__class__ = FoldedNorm


def replace_norms(module: nn.Module) -> None:
    """Put GroupNorm in the place of each BatchNorm, with its activation and affine weights."""
    for name, child in module.named_children():
        replace_norms(child)
        if not isinstance(child, nn.BatchNorm2d):
            continue
        norm = group_norm(child.num_features)
        if child.affine:
            norm.weight.data.copy_(child.weight.data)
            norm.bias.data.copy_(child.bias.data)
        # timm's BatchNormAct2d applies dropout and an activation of its own after the norm.
        after = [getattr(child, part, None) for part in ("drop", "act")]
        setattr(module, name, nn.Sequential(norm, *(part for part in after if part is not None)))
