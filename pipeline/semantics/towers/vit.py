"""open_clip's own ViTs: a map of the whole image, and regions as means of it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor

from pipeline.semantics.towers.regions import positions, read_regions, to_cells


class VitRegions:
    """Means of the tokens in a box.

    A tower that was trained on the mean of its tokens (CLIPA) is read as it was trained. One that
    was trained on its class token has no trained map: its last block is changed as in ClearCLIP
    (Lan et al., ECCV 2024): attention of queries to queries, without the residual
    connection and the feed-forward network, whose outliers drown what a place shows.
    """

    def __init__(self, visual: VisionTransformer, image_scale: float) -> None:
        assert visual.attn_pool is None and visual.patch_size[0] == visual.patch_size[1]
        self._visual, self._image_scale = visual, image_scale

    def __call__(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """See `RegionReader`."""
        visual = self._visual
        pixels, rows = to_cells(pixels, boxes, visual.patch_size[0], self._image_scale)
        states = visual.conv1(pixels)
        grid = (states.shape[2], states.shape[3])
        states = states.flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(states), 1, -1)
        states = torch.cat([first, states], dim=1)
        states = visual.ln_pre(
            states + positions(visual.positional_embedding, visual.grid_size, grid)
        )
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            states = block(states)
        if visual.pool_type == "avg":
            states = last(states)
        else:
            states = attention_to_like(last, states)
        if not visual.final_ln_after_pool:
            states = visual.ln_post(states)
        features = states[:, 1:].transpose(1, 2).unflatten(2, grid)
        regions = read_regions(features, rows, 1, lambda region: region.flatten(1))
        if visual.final_ln_after_pool:
            regions = visual.ln_post(regions)
        return regions @ visual.proj


def attention_to_like(block: ResidualAttentionBlock, states: Tensor) -> Tensor:
    """(B, L, E): values gathered by likeness of queries, and nothing else of the block."""
    attention, width = block.attn, states.shape[-1]
    states = block.ln_1(states)
    query, value = (
        F.linear(states, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
        .unflatten(-1, (attention.num_heads, -1))
        .transpose(1, 2)
        for rows in (slice(width), slice(2 * width, None))
    )
    gathered = F.scaled_dot_product_attention(query, query, value)
    return block.ls_1(attention.out_proj(gathered.transpose(1, 2).flatten(2)))
