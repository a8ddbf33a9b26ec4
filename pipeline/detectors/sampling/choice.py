"""Which of the ways to sample is taken: by device, by what works there, and by the recipe."""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from pipeline.detectors.sampling import compiled, plain, portable
from pipeline.detectors.sampling.compiler import Kernel, load_kernel
from pipeline.detectors.sampling.levels import Shapes

KernelChoice = Literal["auto", "portable"]
"""The recipe's `detector.kernel`."""
HALVES = (torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


def sample_and_sum(
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
    kernel: KernelChoice = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples of `value`, over all levels and points: (B, Q, M * D).

    `value` is (B, S, M, D) for M heads, with the levels of `shapes` (height, width) one after the
    other along S; `locations` (B, Q, M, L, P, 2) are xy, 0 to 1 over a level's whole map, and read
    zeros outside it; `weights` is (B, Q, M, L, P). Both are of `value`'s dtype, or float32 where
    that is a half precision: the arithmetic is float32, and the result has `value`'s dtype. A
    location that is not a number gives one that is not either.
    """
    if _is_traced(value, locations, weights):
        return _in_single(plain.sample_and_sum, value, shapes, locations, weights)
    # The kernels would read beyond the end of what does not fit.
    batch, length, heads, levels, points, _ = locations.shape
    cells = sum(height * width for height, width in shapes)
    assert value.shape[:3] == (batch, cells, heads) and len(shapes) == levels, "sizes differ"
    assert weights.shape == (batch, length, heads, levels, points), "sizes differ"
    _tell_once(value.device.type, kernel_in_use(value.device, kernel, value.dtype))
    if kernel == "auto" and locations.dtype == weights.dtype == torch.float32:
        if value.device.type == "cuda" and _triton_problem(value.device, value.dtype) is None:
            from pipeline.detectors.sampling import triton_kernel

            return triton_kernel.sample_and_sum(value, shapes, locations, weights)
        found = load_kernel() if compiled.fits(value) else None
        if isinstance(found, Kernel):
            sample = partial(compiled.sample_and_sum, kernel=found)
            return _in_single(sample, value, shapes, locations, weights)
    return _in_single(portable.sample_and_sum, value, shapes, locations, weights)


def _in_single(
    sample: Callable[[Tensor, Shapes, Tensor, Tensor], Tensor],
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Half precisions as float32; in bfloat16 not even a location is exact to a pixel."""
    if value.dtype not in HALVES:
        return sample(value, shapes, locations, weights)
    return sample(value.float(), shapes, locations, weights).to(value.dtype)


def kernel_in_use(
    device: torch.device, kernel: KernelChoice = "auto", dtype: torch.dtype = torch.float32
) -> str:
    """What samples tensors of this dtype on this device, and why not something faster; the first
    call may compile."""
    if kernel == "portable":
        return "portable (the recipe's detector.kernel)"
    if device.type == "cuda":
        problem = _triton_problem(device, dtype)
        return "Triton" if problem is None else f"portable ({problem})"
    if device.type == "cpu":
        if dtype not in (torch.float32, *HALVES):
            return f"portable (there is no kernel for {dtype})"
        found = load_kernel()
        if isinstance(found, Kernel):
            return f"compiled here (by {found.compiler})"
        return f"portable ({found})"
    return f"portable (there is no kernel for {device.type})"


def _is_traced(*tensors: Tensor) -> bool:
    """Whether somebody records the operators, who could not look into a kernel."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
        or tensors[0].device.type == "meta"
    )


@cache
def _triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot be used on this GPU, found by a small trial of forward and backward."""
    if dtype not in (torch.float32, *HALVES):
        return f"there is no kernel for {dtype}"
    try:
        from pipeline.detectors.sampling import triton_kernel

        with torch.inference_mode(False), torch.enable_grad():
            value = torch.ones((1, 1, 1, 16), device=device, dtype=dtype, requires_grad=True)
            centre = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device)
            weights = torch.ones((1, 1, 1, 1, 1), device=device)
            output = triton_kernel.sample_and_sum(value, [(1, 1)], centre, weights)
            output.sum().backward()
            right = float(output.detach().mean()) == 1.0 and value.grad is not None
    except Exception as error:  # Whatever it is, training can go on without.
        lines = str(error).strip().splitlines()
        return f"Triton does not work here: {type(error).__name__}: {lines[0] if lines else ''}"
    return None if right else "Triton computes wrong sums here"


@cache
def _tell_once(device: str, text: str) -> None:
    level = logging.WARNING if "(the recipe" not in text and "portable" in text else logging.INFO
    logger.log(level, "deformable attention on %s: %s", device, text)
