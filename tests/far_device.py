"""A device of which every wait is known: tensors on it hold their values in the CPU's memory.

No GPU is needed: PyTorch has a device type `lazy` that no package claims here. What would make the
host wait for a GPU is written down: reading a value, a size that depends on values, a copy back,
and a copy there that is not asked to go on by itself.
"""

import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.data.batch import Batch

ROOT = Path(__file__).resolve().parents[1]
FAR = torch.device("lazy:0")
READS_VALUES = {
    "_local_scalar_dense", "equal", "nonzero", "nonzero_static", "masked_select",
    "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave",
}  # fmt: skip
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


def caller() -> str:
    """The name of the file of ours that is at work."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        # Not ROOT itself: the environment may lie in it.
        if {ROOT / "pipeline", ROOT / "tests"} & set(path.parents) and path != Path(
            __file__
        ).resolve():
            return path.name
    return "?"


class FarTensor(Tensor):
    """A tensor that says it is on `FAR`; `near` is the one that holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device=FAR
        )
        tensor.near = near
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        raise AssertionError(f"{function} outside of `watched`")


def to_far(module: nn.Module) -> nn.Module:
    """Move the parameters and buffers of a module."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(FarTensor(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = FarTensor(buffer)
    return module


def far_batch(batch: Batch) -> Batch:
    """As `Batch.to` leaves it."""
    targets = [
        replace(target, boxes=FarTensor(target.boxes), labels=FarTensor(target.labels))
        for target in batch.targets
    ]
    return replace(
        batch, images=FarTensor(batch.images), mask=FarTensor(batch.mask), targets=targets
    )


class Watch(TorchDispatchMode):
    """Runs everything on the CPU, and lists in `waits` what would have waited for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._made = _MadeFromNumbers(self.waits)

    def __enter__(self) -> "Watch":
        super().__enter__()
        self._made.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._made.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        far: dict[int, FarTensor] = {}

        def near(value: Any) -> Any:
            if not isinstance(value, FarTensor):
                return value
            far[id(value.near)] = value
            return value.near

        given, options = tree_map(near, (args, dict(kwargs or {})))
        goal, is_far = options.get("device"), bool(far)
        if goal is not None:
            is_far, options["device"] = torch.device(goal).type == FAR.type, torch.device("cpu")
        self._note(function.overloadpacket.__name__, given, options, bool(far), is_far)
        result = function(*given, **options)

        def back(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return far[id(value)] if id(value) in far else FarTensor(value)

        return tree_map(back, result) if is_far else result

    def _note(
        self, name: str, args: Sequence[Any], options: dict[str, Any], was_far: bool, is_far: bool
    ) -> None:
        if name == "_to_copy" and was_far and not is_far:
            self.waits.append(f"{caller()}: copy to the CPU")
        if name == "_to_copy" and is_far and not was_far and not options.get("non_blocking"):
            self.waits.append(f"{caller()}: copy from the CPU that is waited for")
        if was_far and name in READS_VALUES:
            self.waits.append(f"{caller()}: {name}")
        if was_far and name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.waits += [f"{caller()}: {name} by a mask"] * bool(masks)


class _MadeFromNumbers(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` copies and waits, where no dispatch mode sees it."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        options = dict(kwargs or {})
        if function not in FROM_NUMBERS:
            return function(*args, **options)
        device = options.pop("device", None)
        if function is torch.Tensor.new_tensor:
            like, *args = args
            options.setdefault("dtype", like.dtype)
            device = device or like.device
        made = torch.tensor(*args, **options)
        if device is None or torch.device(device).type != FAR.type:
            return made
        self._waits.append(f"{caller()}: tensor made there from numbers")
        return FarTensor(made)


def soft_labels_far_away(teacher: Any, batch: Batch) -> tuple[list[Tensor], list[str]]:
    """The labels of a teacher that moves to the device for good, and what waited for it."""
    with Watch() as watch:
        to_far(teacher._visual)
        teacher._text = FarTensor(teacher._text)
        found = teacher.soft_labels(far_batch(batch))
    return [rows.near for rows in found], watch.waits
