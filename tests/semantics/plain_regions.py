"""How each tower reads a region, once more: box by box, in float64, with other people's modules.

RoIAlign is written as a product of two matrices, resolutions are changed by the makers' own ways
of building the tower for another image, and attention is spelled out.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from pipeline.semantics.clip import ClipModel, model_config


def axis(low: float, high: float, bins: int, length: int) -> NDArray[np.float64]:
    """(bins, length): how much of each cell a bin of [low, high] holds.

    Cell k is centred at k + 0.5. A bin is the mean of samples, each between two cells, of which
    there are as many as it is cells long, rounded up.
    """
    found = np.zeros((bins, length))
    samples = math.ceil((high - low) / bins)
    for i in range(bins):
        for k in range(samples):
            at = low + (high - low) * (i + (k + 0.5) / samples) / bins - 0.5
            at = min(max(at, 0), length - 1)
            left = min(int(at), max(length - 2, 0))
            found[i, left] += (1 - (at - left)) / samples
            if length > 1:
                found[i, left + 1] += (at - left) / samples
    return found


def pooled(features: Tensor, box: Tensor, grid: int) -> Tensor:
    """(E, grid, grid) of a map (E, h, w) and a box xyxy in cells."""
    x0, y0, x1, y1 = box.tolist()
    rows = torch.from_numpy(axis(y0, y1, grid, features.shape[1]))
    columns = torch.from_numpy(axis(x0, x1, grid, features.shape[2]))
    return torch.einsum("yh,ehw,xw->eyx", rows, features, columns)


@torch.no_grad()
def plain_crops(model: ClipModel, size: int, pixels: Tensor, boxes: Tensor) -> Tensor:
    visual = copy.deepcopy(model.visual).double()
    rows = []
    for box in boxes.double():
        found = visual(pooled(pixels.double(), box, size)[None])
        rows.append((found[0] if isinstance(found, tuple) else found)[0])
    return torch.stack(rows)


@torch.no_grad()
def plain_dense(name: str, model: ClipModel, pixels: Tensor, boxes: Tensor) -> Tensor:
    """(N, D) for one image (3, H, W) of whole cells, and boxes (N, 4) xyxy in pixels."""
    readers = {
        "miniature-rn": _resnet,
        "miniature-vit": _vit,
        "miniature-vit-mean": _vit,
        "miniature-map": _map,
        "miniature-convnext": _convnext,
    }
    return readers[name](name, model, pixels.double()[None], boxes.double())


def _resnet(name: str, model: ClipModel, pixels: Tensor, boxes: Tensor) -> Tensor:
    visual = copy.deepcopy(model.visual).double()
    features = visual.stem(pixels)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        features = layer(features)
    grid = visual.image_size // 32
    regions = [visual.attnpool(pooled(features[0], box / 32, grid)[None])[0] for box in boxes]
    return torch.stack(regions)


def _vit(name: str, model: ClipModel, pixels: Tensor, boxes: Tensor) -> Tensor:
    config = model_config(name)
    config["vision_cfg"]["image_size"] = tuple(pixels.shape[-2:])
    visual = open_clip.CLIP(**config).visual.eval()
    state = {f"visual.{key}": value for key, value in model.visual.state_dict().items()}
    resize_pos_embed(state, SimpleNamespace(visual=visual))
    visual.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    visual = visual.double()
    seen: list[Tensor] = []
    last = visual.transformer.resblocks[-1]
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    last.register_forward_hook(lambda _, given, made: seen.append(made))
    visual(pixels)
    before, after = seen[0][0], seen[1][0]
    height, width = visual.grid_size
    rows = []
    if name == "miniature-vit-mean":
        features = after[1:].T.reshape(-1, height, width)
        for box in boxes:
            rows.append(visual.ln_post(pooled(features, box / 8, 1).flatten()) @ visual.proj)
        return torch.stack(rows)
    features = visual.ln_post(_query_to_query(last, before))[1:].T.reshape(-1, height, width)
    return torch.stack([pooled(features, box / 8, 1).flatten() @ visual.proj for box in boxes])


def _query_to_query(block: nn.Module, states: Tensor) -> Tensor:
    """(L, E): head by head, token by token."""
    states = block.ln_1(states)
    width, heads = states.shape[1], block.attn.num_heads
    projected = states @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    query, value = projected[:, :width], projected[:, 2 * width :]
    depth = width // heads
    found = torch.zeros_like(states)
    for head in range(heads):
        part = slice(head * depth, (head + 1) * depth)
        for token in range(len(states)):
            scores = (query[:, part] @ query[token, part]) / math.sqrt(depth)
            weights = scores.exp() / scores.exp().sum()
            found[token, part] = weights @ value[:, part]
    return found @ block.attn.out_proj.weight.T + block.attn.out_proj.bias


def _map(name: str, model: ClipModel, pixels: Tensor, boxes: Tensor) -> Tensor:
    trunk = copy.deepcopy(model.visual.trunk)
    trunk.set_input_size(img_size=tuple(pixels.shape[-2:]))
    trunk = trunk.double()
    height, width = pixels.shape[-2] // 8, pixels.shape[-1] // 8
    features = trunk.forward_features(pixels)[0].T.reshape(-1, height, width)
    rows = []
    for box in boxes:
        tokens = pooled(features, box / 8, 4).flatten(1).T
        rows.append(trunk.attn_pool(tokens[None])[0])
    return torch.stack(rows)


def _convnext(name: str, model: ClipModel, pixels: Tensor, boxes: Tensor) -> Tensor:
    visual = copy.deepcopy(model.visual).double()
    features = visual.trunk.forward_features(pixels)[0]
    head = visual.trunk.head
    rows = []
    for box in boxes:
        mean = pooled(features, box / 32, 1).flatten()
        rows.append(F.layer_norm(mean, mean.shape, head.norm.weight, head.norm.bias, head.norm.eps))
    return visual.head(torch.stack(rows))
