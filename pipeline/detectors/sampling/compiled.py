"""Deformable sampling on a CPU by the kernel that was compiled there."""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.detectors.sampling.compiler import Kernel
from pipeline.detectors.sampling.levels import Shapes, level_sizes

MOST_DEPTH = 512
"""Of a head; kernel.cpp knows it too."""
LEAST_WORK = 2**18
"""Numbers read per thread: less is done before a second thread has begun."""


class _Problem(ctypes.Structure):
    """As in kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("value", "locations", "weights", "shapes")),
        *(
            (name, ctypes.c_int64)
            for name in ("images", "cells", "queries", "heads", "depth", "levels", "points")
        ),
        ("threads", ctypes.c_int64),
    )


class _SampleAndSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        sizes: Tensor,
        library: ctypes.CDLL,
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.sizes, ctx.library = sizes, library
        batch, length = locations.shape[:2]
        output = value.new_empty((batch, length, value.shape[2] * value.shape[3]))
        problem = _problem(value, locations, weights, sizes)
        library.longtail_sample_forward(ctypes.byref(problem), output.data_ptr())
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        value, locations, weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        wants_value, wants_locations, wants_weights, *_ = ctx.needs_input_grad
        grad_value = torch.zeros_like(value) if wants_value else None
        grad_locations = torch.empty_like(locations) if wants_locations else None
        grad_weights = torch.empty_like(weights) if wants_weights else None
        problem = _problem(value, locations, weights, ctx.sizes)
        ctx.library.longtail_sample_backward(
            ctypes.byref(problem),
            gradient.data_ptr(),
            *(
                None if tensor is None else tensor.data_ptr()
                for tensor in (grad_value, grad_locations, grad_weights)
            ),
        )
        return grad_value, grad_locations, grad_weights, None, None


def fits(value: Tensor) -> bool:
    """Whether the kernel can sample this, which is taken as float32 if it has fewer digits."""
    return (
        value.device.type == "cpu"
        and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and value.shape[3] <= MOST_DEPTH
    )


def sample_and_sum(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, kernel: Kernel
) -> Tensor:
    """See `pipeline.detectors.sampling.choice.sample_and_sum`; all tensors are float32."""
    output: Tensor = _SampleAndSum.apply(
        value.contiguous(),
        locations.contiguous(),
        weights.contiguous(),
        level_sizes(shapes, value.device),
        kernel.library,
    )
    return output


def _problem(value: Tensor, locations: Tensor, weights: Tensor, sizes: Tensor) -> _Problem:
    batch, cells, heads, depth = value.shape
    _, queries, _, levels, points, _ = locations.shape
    work = weights.numel() * depth
    threads = min(torch.get_num_threads(), max(1, work // LEAST_WORK))
    tensors = (value, locations, weights, sizes)
    addresses = (tensor.data_ptr() for tensor in tensors)
    return _Problem(*addresses, batch, cells, queries, heads, depth, levels, points, threads)
