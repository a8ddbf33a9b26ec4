"""Sizes of the levels that deformable attention reads."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, int]]
"""(height, width) of each level."""


def level_sizes(shapes: Shapes, device: torch.device) -> Tensor:
    """(L, 2) int32 (height, width) of the levels.

    A GPU gets each set of sizes once, from pinned memory: a plain copy would wait for all work
    that is under way there, in each attention of each step.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(shapes, dtype=torch.int32).to(device, non_blocking=True)
    return _on_gpu(tuple((height, width) for height, width in shapes), device)


@lru_cache(maxsize=256)
def _on_gpu(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        sizes = torch.tensor(shapes, dtype=torch.int32).pin_memory()
        return sizes.to(device, non_blocking=True)
