"""Swin on maps of any size: padding first, then the shift, as the published detectors do it."""

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn


class _PaddedFirst:
    """timm's block, but maps are padded to whole windows before they are shifted.

    timm shifts first, so that on a padded map the shifted rows stand before the padding, where the
    attention mask does not expect them. Swin's own detection code (Liu et al. 2021) pads first.
    """

    window_size: tuple[int, int]

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        output: Tensor = super()._attn(x)  # type: ignore[misc]
        return output[:, :height, :width].contiguous()


class PaddedFirstBlock(_PaddedFirst, SwinTransformerBlock):
    """A block of Swin."""


class PaddedFirstV2Block(_PaddedFirst, SwinTransformerV2Block):
    """A block of Swin V2."""


PADDED_FIRST: dict[type[nn.Module], type[nn.Module]] = {
    SwinTransformerBlock: PaddedFirstBlock,
    SwinTransformerV2Block: PaddedFirstV2Block,
}


def pad_before_shifting(body: nn.Module) -> None:
    """Let each Swin block of the body pad first, with its parameters as they are."""
    for module in body.modules():
        module.__class__ = PADDED_FIRST.get(type(module), type(module))
