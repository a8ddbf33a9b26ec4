"""Ground-truth boxes that are not quite right, by a known share of their size."""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Targets
from pipeline.data.plan.draws import draw, generator

DEFINITION = (
    "At noise s, a box's centre moves by u s / 2 of its width and by u s / 2 of its height, and "
    "its width and height are multiplied by 1 + u s each; the four u are uniform in [-1, 1], "
    "drawn once for each box from the seed and the same at every level. The box is then cut at "
    "the borders of the image, and is at least a pixel wide and high. So s = 1 moves the centre "
    "anywhere within the box, at sizes from nothing to twice its own (the box noise of DN-DETR, "
    "with one scale for place and size)."
)


def jittered(target: Targets, noise: float, seed: int) -> Tensor:
    """The boxes of an image at a `noise` from 0 to 1, (N, 4) cxcywh as fractions of the image.

    The same `seed` gives a box the same draws at every noise; see `DEFINITION`.
    """
    assert 0 <= noise <= 1
    if noise == 0:
        return target.boxes
    shape = len(target.boxes), 4
    rng = generator(draw(seed, "box noise", target.image_id))
    draws = torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32)).to(target.boxes.device)
    size = target.boxes[:, 2:]
    centre = target.boxes[:, :2] + draws[:, :2] * noise * size / 2
    half = size * (1 + draws[:, 2:] * noise) / 2
    pixel = torch.tensor([1 / target.size[1], 1 / target.size[0]], device=size.device)
    low = (centre - half).clamp(min=0).minimum(1 - pixel)
    high = (centre + half).clamp(max=1).maximum(low + pixel)
    return torch.cat([(low + high) / 2, high - low], dim=1)
