"""A plain ViT on large images: attention within windows, and in a few blocks to the whole image.

As ViTDet (Li et al. 2022). timm's own blocks run over the windows as over small images. Class and
register tokens are copied into each window, and what the windows make of them is averaged, so that
all windows go on with the same tokens. Stochastic depth skips windows, not whole images.
"""

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.detectors.backbone.maps import pad_to_multiple

PlainViT: TypeAlias = VisionTransformer | Eva


class Windows(NamedTuple):
    """How a plain ViT attends: `size` in patches, `global_blocks` by number."""

    size: int
    global_blocks: frozenset[int]


class _Grid(NamedTuple):
    """Patches of an image: their rows and columns, the window's, and how many tokens precede."""

    height: int
    width: int
    window_height: int
    window_width: int
    num_prefix: int

    @property
    def num_windows(self) -> int:
        return -(-self.height // self.window_height) * -(-self.width // self.window_width)


def evenly_spaced(num_blocks: int, num_global: int) -> frozenset[int]:
    """Numbers of the global blocks: the last of each of `num_global` equal runs."""
    return frozenset(round(num_blocks * (i + 1) / num_global) - 1 for i in range(num_global))


def run_vit(
    body: PlainViT, images: Tensor, windows: Windows, checkpointed: frozenset[int] = frozenset()
) -> Tensor:
    """The last block's map (B, dim, h, w) of images (B, 3, H, W), padded to whole patches.

    Blocks of the numbers in `checkpointed` are computed again in the backward pass.
    """
    images = pad_to_multiple(images, body.patch_embed.patch_size[0])
    x = body.patch_embed(images)
    batch, height, width, dim = x.shape
    x, rope = _embed(body, x)
    x = body.norm_pre(x)
    grid = _Grid(
        height,
        width,
        min(windows.size, height),
        min(windows.size, width),
        body.num_prefix_tokens,
    )
    for i, block in enumerate(body.blocks):
        own = rope[i] if rope is not None and getattr(body, "rope_mixed", False) else rope
        whole = i in windows.global_blocks or grid.num_windows == 1
        run = _run_globally if whole else _run_in_windows
        if i in checkpointed and torch.is_grad_enabled():
            x = checkpoint(run, block, x, own, grid, use_reentrant=False)
        else:
            x = run(block, x, own, grid)
    return x[:, grid.num_prefix :].transpose(1, 2).reshape(batch, dim, height, width)


def _embed(body: PlainViT, patches: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, prefix + h*w, dim) with positions resampled by timm, and rotary embeddings."""
    if isinstance(body, Eva):
        tokens, rope = body._pos_embed(patches)
        return tokens, rope
    return body._pos_embed(patches), None


def _run_globally(block: nn.Module, x: Tensor, rope: Tensor | None, _: _Grid) -> Tensor:
    output = block(x) if rope is None else block(x, rope=rope)
    assert isinstance(output, Tensor)
    return output


def _run_in_windows(block: nn.Module, x: Tensor, rope: Tensor | None, grid: _Grid) -> Tensor:
    prefix, patches = x[:, : grid.num_prefix], x[:, grid.num_prefix :]
    batch, _, dim = x.shape
    count = grid.num_windows
    inside = _partition(patches.reshape(batch, grid.height, grid.width, dim), grid)
    tokens = torch.cat([prefix.repeat_interleave(count, dim=0), inside], dim=1)
    options = {"attn_mask": _padding_mask(x, grid)}
    if rope is not None:
        options["rope"] = _cut(rope, batch, grid)
    tokens = block(tokens, **options)
    inside = _join(tokens[:, grid.num_prefix :], batch, grid)
    prefix = tokens[:, : grid.num_prefix].unflatten(0, (batch, count)).mean(1)
    return torch.cat([prefix, inside.flatten(1, 2)], dim=1)


def _partition(patches: Tensor, grid: _Grid) -> Tensor:
    """(B, h, w, C) to (B * windows, window_height * window_width, C), padded with zeros."""
    rows, columns = grid.window_height, grid.window_width
    patches = F.pad(patches, (0, 0, 0, -grid.width % columns, 0, -grid.height % rows))
    batch, height, width, dim = patches.shape
    patches = patches.view(batch, height // rows, rows, width // columns, columns, dim)
    return patches.transpose(2, 3).reshape(-1, rows * columns, dim)


def _join(inside: Tensor, batch: int, grid: _Grid) -> Tensor:
    """The way back, without the padding: (B, h, w, C)."""
    rows, columns = grid.window_height, grid.window_width
    down, across = -(-grid.height // rows), -(-grid.width // columns)
    patches = inside.reshape(batch, down, across, rows, columns, -1).transpose(2, 3)
    patches = patches.reshape(batch, down * rows, across * columns, -1)
    return patches[:, : grid.height, : grid.width]


def _padding_mask(x: Tensor, grid: _Grid) -> Tensor | None:
    """(B * windows, 1, 1, prefix + window) bool, False on padding, which nothing attends to."""
    if grid.height % grid.window_height == 0 and grid.width % grid.window_width == 0:
        return None
    real = x.new_ones((1, grid.height, grid.width, 1), dtype=torch.bool)
    real = _partition(real, grid).squeeze(-1)
    real = F.pad(real, (grid.num_prefix, 0), value=True)
    return real.repeat(x.shape[0], 1)[:, None, None]


def _cut(rope: Tensor, batch: int, grid: _Grid) -> Tensor:
    """Rotary embeddings of each window's own place: (B * windows, heads or 1, window, D).

    `rope` is (patches, D) or (heads, patches, D). Between patches only differences of positions
    count, but tokens that precede them are not rotated and see where a patch lies in the image.
    """
    heads = rope.reshape(-1, grid.height, grid.width, rope.shape[-1])
    cut = _partition(heads, grid).unflatten(0, (heads.shape[0], -1)).transpose(0, 1)
    return cut.repeat(batch, 1, 1, 1)
