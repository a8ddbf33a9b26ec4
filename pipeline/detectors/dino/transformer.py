"""DINO's transformer: deformable encoder, two-stage query selection, refining decoder."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline import recipe
from pipeline.detectors.attention import DeformableAttention, QueryAttention, Shapes
from pipeline.detectors.backbone import FeatureMap
from pipeline.detectors.boxes import inverse_sigmoid


class Memory(NamedTuple):
    """All levels one after the other: `features` (B, S, dim), `mask` (B, S) True on padding,
    `shapes` (height, width) of each level, and `valid_ratios` (B, L, 2), the part of each map's
    width and height that is image."""

    features: Tensor
    mask: Tensor
    shapes: Shapes
    valid_ratios: Tensor


class Queries(NamedTuple):
    """Queries that enter the decoder: `content` (B, Q, dim) and `boxes` (B, Q, 4) cxcywh."""

    content: Tensor
    boxes: Tensor


class Decoded(NamedTuple):
    """Normed hidden states (L, B, T, dim) of each decoder layer, and the boxes (L, B, T, 4) that
    each layer refined."""

    hidden: Tensor
    references: Tensor


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def sine_embedding(position: Tensor, dim: int, temperature: float) -> Tensor:
    """Sines and cosines of (...) positions in radians, (..., dim), in turn."""
    exponent = torch.arange(dim // 2, device=position.device, dtype=torch.float32) * 2 / dim
    angle = position[..., None] / temperature**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def map_position(mask: Tensor, dim: int, temperature: float = 20.0, offset: float = 0.0) -> Tensor:
    """Positional encoding (B, h * w, dim) of a map: y, then x, counted over the valid part, by
    default with DINO's temperature."""
    valid = (~mask).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = (y + offset) / (y[:, -1:, :] + 1e-6) * 2 * math.pi
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    both = [sine_embedding(axis, dim // 2, temperature) for axis in (y, x)]
    return torch.cat(both, dim=-1).flatten(1, 2)


def box_position(boxes: Tensor, dim: int) -> Tensor:
    """Positional encoding (..., 2 * dim) of cxcywh boxes, in the order y, x, w, h."""
    parts = [sine_embedding(boxes[..., i] * 2 * math.pi, dim // 2, 10000) for i in (1, 0, 2, 3)]
    return torch.cat(parts, dim=-1)


def flatten_maps(maps: Sequence[FeatureMap]) -> Memory:
    """Put the levels one after the other."""
    ratios = []
    for level in maps:
        valid = (~level.mask).float()
        ratios.append(torch.stack([valid[:, 0].mean(1), valid[:, :, 0].mean(1)], dim=-1))
    return Memory(
        torch.cat([level.features.flatten(2).transpose(1, 2) for level in maps], dim=1),
        torch.cat([level.mask.flatten(1) for level in maps], dim=1),
        [(level.features.shape[2], level.features.shape[3]) for level in maps],
        torch.stack(ratios, dim=1),
    )


def grid_centres(memory: Memory) -> Tensor:
    """Centres (B, S, 2) xy of all cells, as fractions of the unpadded image."""
    centres = []
    for level, (height, width) in enumerate(memory.shapes):
        device = memory.features.device
        y = torch.arange(height, device=device, dtype=torch.float32) + 0.5
        x = torch.arange(width, device=device, dtype=torch.float32) + 0.5
        cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
        sides = torch.tensor([width, height]).to(device, non_blocking=True)
        size = memory.valid_ratios[:, level] * sides  # (B, 2)
        # Whole again: a rounding error would move cells across the anchors' limits of 0.01, 0.99.
        centres.append(cells[None] / size.round()[:, None])
    return torch.cat(centres, dim=1)


def anchor_boxes(memory: Memory) -> tuple[Tensor, Tensor]:
    """One box for each cell, before the sigmoid (B, S, 4), and which of them are usable (B, S).

    Sides are 0.05 of the image, doubled at each level. Boxes on padding or within 0.01 of the
    border are not usable; they are +inf, which stays the corner box after any refinement.
    """
    centres = grid_centres(memory)
    sides = [
        centres.new_full((height * width,), 0.05 * 2.0**level)
        for level, (height, width) in enumerate(memory.shapes)
    ]
    side = torch.cat(sides)[None, :, None].expand(centres.shape[0], -1, 2)
    boxes = torch.cat([centres, side], dim=-1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~memory.mask
    logits = torch.log(boxes / (1 - boxes))
    return logits.masked_fill(~usable[..., None], math.inf), usable


class FeedForward(nn.Module):
    """Two linear layers with ReLU."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.linear1(x).relu())))


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then the feed-forward net; norm after each."""

    def __init__(self, section: recipe.DetectorSection) -> None:
        super().__init__()
        dim, levels = section.hidden_dim, section.num_feature_levels
        self.self_attn = DeformableAttention(dim, section.num_heads, levels, section.num_points)
        self.self_attn_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, section.ffn_dim, section.dropout)
        self.ffn_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, memory: Memory, position: Tensor, reference: Tensor) -> Tensor:
        x = memory.features
        attended = self.self_attn(x + position, reference, x, memory.mask, memory.shapes)
        x = self.self_attn_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.ffn(x))


class DecoderLayer(nn.Module):
    """Attention among the queries, deformable attention to the memory, feed-forward net."""

    def __init__(self, section: recipe.DetectorSection) -> None:
        super().__init__()
        dim, levels = section.hidden_dim, section.num_feature_levels
        self.self_attn = QueryAttention(dim, section.num_heads, section.dropout)
        self.self_attn_norm = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, section.num_heads, levels, section.num_points)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, section.ffn_dim, section.dropout)
        self.ffn_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(section.dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Memory,
        denoising_mask: Tensor | None,
    ) -> Tensor:
        attended = self.self_attn(content, position, denoising_mask)
        x = self.self_attn_norm(content + self.dropout(attended))
        attended = self.cross_attn(
            x + position, reference, memory.features, memory.mask, memory.shapes
        )
        x = self.cross_attn_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.ffn(x))


class Encoder(nn.Module):
    """Deformable encoder over the flattened levels."""

    def __init__(self, section: recipe.DetectorSection) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(section) for _ in range(section.encoder_layers))
        self.level_embed = nn.Parameter(torch.empty(section.num_feature_levels, section.hidden_dim))
        self.activation_checkpointing = False
        nn.init.normal_(self.level_embed)

    def forward(self, memory: Memory, positions: Sequence[Tensor]) -> Memory:
        """`positions` are the encodings (B, h * w, dim) of the levels."""
        position = torch.cat(
            [part + self.level_embed[level] for level, part in enumerate(positions)], dim=1
        )
        reference = grid_centres(memory)[:, :, None] * memory.valid_ratios[:, None]
        for layer in self.layers:
            features = _run(layer, self.activation_checkpointing, memory, position, reference)
            memory = memory._replace(features=features)
        return memory


class QuerySelection(nn.Module):
    """The second stage's input: the best cells of the encoder give boxes, and learned vectors the
    content (DINO, section 3.4)."""

    def __init__(self, section: recipe.DetectorSection) -> None:
        super().__init__()
        dim = section.hidden_dim
        self.num_queries = section.num_queries
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        self.tgt_embed = nn.Parameter(torch.empty(section.num_queries, dim))
        nn.init.xavier_uniform_(self.enc_output.weight)
        nn.init.xavier_uniform_(self.tgt_embed)

    def forward(
        self, memory: Memory, score: Callable[[Tensor], Tensor], refine: Callable[[Tensor], Tensor]
    ) -> tuple[Queries, Queries]:
        """Queries for the decoder (boxes without gradient), and the selected cells themselves
        (features and boxes with gradient) for the encoder's loss.

        `score` gives (B, S) from the cells' features, `refine` a box delta. Cells without a usable
        anchor are in the running as in the official code, all with the features of a cell of zeros
        and the corner box; a map with fewer cells than queries gives fewer queries.
        """
        anchors, usable = anchor_boxes(memory)
        cells = memory.features.masked_fill(~usable[..., None], 0.0)
        cells = self.enc_output_norm(self.enc_output(cells))
        with torch.no_grad():
            scores = score(cells).float()
            count = min(self.num_queries, scores.shape[1])
            chosen = scores.topk(count, dim=1).indices[..., None]
        features = cells.gather(1, chosen.expand(-1, -1, cells.shape[-1]))
        boxes = (refine(features).float() + anchors.gather(1, chosen.expand(-1, -1, 4))).sigmoid()
        content = self.tgt_embed[:count].expand(cells.shape[0], -1, -1)
        return Queries(content, boxes.detach()), Queries(features, boxes)


class Decoder(nn.Module):
    """Refines boxes layer by layer; each layer's box loss reaches the layer before it too (look
    forward twice, DINO, section 3.5)."""

    def __init__(self, section: recipe.DetectorSection) -> None:
        super().__init__()
        self.dim = section.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(section) for _ in range(section.decoder_layers))
        self.norm = nn.LayerNorm(self.dim)
        self.ref_point_head = MLP(2 * self.dim, self.dim, self.dim, 2)
        self.activation_checkpointing = False
        for parameter in self.ref_point_head.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        queries: Queries,
        memory: Memory,
        refine: Sequence[Callable[[Tensor], Tensor]],
        denoising_mask: Tensor | None,
    ) -> Decoded:
        """`refine` gives each layer's box delta of (B, T, dim) features; `denoising_mask` (B, N, T)
        holds for the first N queries."""
        x, boxes = queries
        undetached = boxes
        ratios = torch.cat([memory.valid_ratios, memory.valid_ratios], dim=-1)[:, None]
        hidden, references = [], []
        for number, layer in enumerate(self.layers):
            reference = boxes[:, :, None] * ratios
            # Positions are those in the padded first level, as in the official code.
            position = self.ref_point_head(box_position(reference[:, :, 0], self.dim))
            x = _run(
                layer, self.activation_checkpointing, x, position, reference, memory, denoising_mask
            )
            hidden.append(self.norm(x))
            references.append(undetached)
            if number + 1 < len(self.layers):
                undetached = (refine[number](x).float() + inverse_sigmoid(boxes)).sigmoid()
                boxes = undetached.detach()
        return Decoded(torch.stack(hidden), torch.stack(references))


def _run(layer: nn.Module, checkpointed: bool, *arguments: Memory | Tensor | None) -> Tensor:
    if checkpointed and torch.is_grad_enabled():
        output = checkpoint(layer, *arguments, use_reentrant=False)
    else:
        output = layer(*arguments)
    assert isinstance(output, Tensor)
    return output
