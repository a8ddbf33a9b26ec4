"""How much memory operators would hold: what they give is counted, and nothing is computed.

Tensors are fake ones of PyTorch's `FakeTensorMode`: they have shapes, dtypes and an autograd graph,
and no memory. So the real model, with its real backward pass, can be asked what it keeps at any
size of image, on a machine that could hold none of it.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

IN_SINGLE = (
    (functional, "layer_norm"),
    (functional, "group_norm"),
    (functional, "softmax"),
    (functional, "log_softmax"),
    (torch, "softmax"),
    (torch, "log_softmax"),
    (Tensor, "softmax"),
    (Tensor, "log_softmax"),
)
"""Whose halves become float32 under autocast on a GPU, and not on a CPU."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators under it made and that are still alive.

    `live` are those of now, `peak` the most so far. Tensors from before, such as parameters, do not
    count, and neither does what an operator needs while it runs and does not give.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A view, or what was altered in place, may be of a tensor from before.
            if storage._cdata not in self._held and all(
                storage._cdata != given._cdata for given in _storages((args, kwargs))
            ):
                self._hold(storage)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._held[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, key: int) -> None:
        self.live -= self._held.pop(key)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """What is behind the tensors of arguments or results; views share it."""
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def replaced(*places: tuple[Any, str, object]) -> Iterator[None]:
    """Put values in the places of attributes, (owner, name, value), for as long as this is open."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, value in places:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def autocast_as_on_gpu() -> AbstractContextManager[None]:
    """Let a CPU's autocast compute in float32 the norms and softmaxes that a GPU's does.

    By names, since modes of PyTorch do not hold for what a backward pass computes again.
    """
    return replaced(*((owner, name, _single(getattr(owner, name))) for owner, name in IN_SINGLE))


def _single(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_in_single, (args, kwargs))
        return function(*args, **kwargs)

    return run


def _in_single(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def fake_mode() -> FakeTensorMode:
    """Where fake tensors come from. Real ones may be mixed with them, and what is made of both is
    fake; what is made of real ones alone (indices, noise) is computed."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def without_memory(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors on the CPU in the place of a module's parameters and buffers."""
    known: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            with mode:
                made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            trains = tensor.requires_grad
            parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(made, requires_grad=trains) if parameter else made
        return known[id(tensor)]

    for part in module.modules():
        for group in (part._parameters, part._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    group[name] = fake(tensor)  # type: ignore[assignment]
