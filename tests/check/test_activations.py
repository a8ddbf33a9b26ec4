"""Counting memory on fake tensors, against tensors that are there."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_dino import NUM_CATEGORIES, SMALL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.check.activations import MicroBatch, StepBytes, meta_student, step_bytes, targets_of
from pipeline.check.live_bytes import LiveBytes, autocast_as_on_gpu, fake_mode, without_memory
from pipeline.detectors import build_detector
from pipeline.detectors.interface import LossContext
from pipeline.recipe import Recipe
from pipeline.training.student import Student

BATCH = MicroBatch(images=2, height=64, width=96, boxes=3, columns=NUM_CATEGORIES)


def recipe(**training: object) -> Recipe:
    lvis = {"name": "lvis", "format": "lvis", "images": "coco", "annotations": "lvis.json"}
    linear = {"class_head": {"kind": "linear"}, "losses": {"federated_categories": 0}}
    return Recipe.model_validate(
        {
            "name": "counted",
            "semantic": None,
            "data": {"root": ".", "train": [lvis]},
            "detector": SMALL | linear,
            "training": {"steps": 1, **training},
        }
    )


@cache
def counted(**training: object) -> StepBytes:
    return step_bytes(meta_student(recipe(**training), NUM_CATEGORIES), BATCH, on_gpu=False)


def test_live_bytes_of_a_chain_that_can_be_counted_by_hand() -> None:
    with fake_mode():
        x = torch.empty(1000, requires_grad=True)
    live = LiveBytes()
    with live:
        assert x.view(10, 100).t().shape == (100, 10) and live.live == 0  # It was there before.
        y = x.exp()  # kept: the derivative is the result
        assert live.live == 4000
        z = y.view(10, 100).sum()  # a view takes nothing, a sum four bytes
        assert live.live == 4004
        z.backward()
        # The gradient of y (a view of four bytes) and that of x, beside y.
        assert live.peak == 4000 + 4 + 4 + 4000
        del y, z
    x.grad = None
    assert live.live <= 8


def test_what_is_saved_is_what_autograd_saves_of_real_tensors() -> None:
    section = recipe().detector
    torch.manual_seed(0)
    detector = build_detector(section, num_categories=NUM_CATEGORIES, text_embeddings=None)
    student = Student(detector).train()
    own = {p.untyped_storage().data_ptr() for p in (*student.parameters(), *student.buffers())}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = student(
            images, torch.zeros(2, 64, 96).bool(), targets_of(BATCH), LossContext(6.0, None)
        )
    assert losses
    real = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    found = counted()
    assert found.saved == pytest.approx(real, rel=0.02)
    assert found.saved < found.peak < 2 * found.saved


def test_more_pixels_take_more_and_checkpointing_less() -> None:
    plain, lean = counted(), counted(activation_checkpointing=True)
    assert lean.saved < plain.saved and lean.peak < plain.peak
    student = meta_student(recipe(), NUM_CATEGORIES)
    wide = step_bytes(student, BATCH._replace(images=4), on_gpu=False)
    # All but the loss and a few indices is of images.
    assert wide.saved == pytest.approx(2 * plain.saved, rel=0.02)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.norm(self.outer(F.gelu(self.inner(x)))))
        return self.outer(F.softmax(x, dim=-1))


def saved_of(device: str, block: nn.Module, run: Any) -> int:
    """Bytes that wait for the backward pass, in bfloat16 of `device`'s autocast."""
    mode = fake_mode()
    without_memory(block, mode)
    if device != "cpu":
        with mode:
            for module in block.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(
                            torch.empty_like(parameter, device=device)
                        )
    with mode:
        x = torch.empty(32, 64, device=device, requires_grad=True)
    live = LiveBytes()
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        with live:
            output = run(block, x)
            return live.live + 0 * output.numel()
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@pytest.mark.skipif(torch.version.cuda is None, reason="torch knows no CUDA autocast here")
def test_autocast_keeps_what_that_of_a_gpu_keeps() -> None:
    def run(block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    on_gpu, on_cpu = (saved_of(device, _Block(), run) for device in ("cuda", "cpu"))
    with autocast_as_on_gpu():
        as_on_gpu = saved_of("cpu", _Block(), run)
    assert as_on_gpu == on_gpu > on_cpu


def test_a_block_that_is_computed_again_keeps_its_dtypes() -> None:
    with torch.device("meta"):
        block = _Block()
    mode, live = fake_mode(), LiveBytes()
    without_memory(block, mode)
    with mode:
        x = torch.empty(32, 64, requires_grad=True)
    with autocast_as_on_gpu(), live:
        with torch.autocast("cpu", torch.bfloat16):
            output = checkpoint(block, x, use_reentrant=False)
        output.float().sum().backward()  # Raises where a recomputed tensor has another dtype.
    assert x.grad is not None and live.peak > 0


def test_functions_are_as_before_afterwards() -> None:
    counted()
    before = F.layer_norm, torch.softmax
    with pytest.raises(RuntimeError, match="inside"), autocast_as_on_gpu():
        assert F.layer_norm is not before[0]
        raise RuntimeError("inside")
    assert (F.layer_norm, torch.softmax) == before
    from pipeline.detectors import attention
    from pipeline.detectors.dino import losses

    assert attention.sample_and_sum.__module__ == "pipeline.detectors.sampling.choice"
    assert losses.match.__module__ == "pipeline.detectors.dino.matcher"
