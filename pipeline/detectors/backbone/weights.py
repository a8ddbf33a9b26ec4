"""Weights of a body from a file or the hub: safe reading, timm's converters, strict comparison."""

import argparse
import logging
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict, load_state_dict_from_hf
from torch import Tensor, nn

from pipeline.errors import DataError, RecipeError, StorageError

HUB_PREFIXES = ("hf-hub:", "timm/")
# Published files hold the weights under one of these; averaged ones are what was evaluated.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher")
SHOWN = 10

_log = logging.getLogger(__name__)


def is_local(weights: str) -> bool:
    """Whether recipe weights name a file, rather than timm's own tag or an address on the hub."""
    return weights != "pretrained" and not weights.startswith(HUB_PREFIXES)


def check_file(weights: str | None, name: str) -> None:
    """Raise `RecipeError` unless the weights of the recipe, where they are a file, exist."""
    if weights is not None and is_local(weights) and not Path(weights).is_file():
        raise RecipeError(
            f"detector.backbone.weights {weights!r} is no file; give a local safetensors or "
            f"PyTorch file with weights of {name}, `pretrained` for timm's own, an address on the "
            "hub (hf-hub:OWNER/NAME), or null for random ones"
        )


def load_weights(body: nn.Module, full: nn.Module, weights: str, name: str) -> None:
    """Fill the body from a file or an address on the hub.

    `full` is the whole model, without memory, which timm's converters look at: they know the
    authors' own names, and resample positional embeddings to another size. Raises `RecipeError`
    where tensors of the body are missing, have another shape, or are left over in its modules. A
    body on the meta device is only compared.
    """
    check_file(weights, name)
    tree = _read_file(Path(weights)) if is_local(weights) else _read_hub(weights)
    state = _converted(_unwrapped(tree), full, weights, name)
    _compare(body, full, state, weights, name)
    own = {_flat(key): key for key in body.state_dict()}
    fitting = {own[_flat(key)]: tensor for key, tensor in state.items() if _flat(key) in own}
    if any(tensor.is_meta for tensor in body.state_dict().values()):
        return
    left = len(state) - len(fitting)
    if left:
        _log.info("%s: %d tensors are not of the backbone and were left out", weights, left)
    body.load_state_dict(fitting, strict=False)


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # A namespace of arguments is the one harmless class that published files hold.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    # The restricted unpickler looks up what it reads: text for a file ends in any of these.
    except (pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"detector.backbone.weights {str(path)!r} holds more than tensors, or is no PyTorch "
            "file, and is never executed; save its state dict alone, best as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise StorageError(
            f"detector.backbone.weights {str(path)!r} cannot be read: "
            f"{str(error) or type(error).__name__}; it may be truncated, so fetch it again"
        ) from error


def _read_hub(weights: str) -> Any:
    address = weights.removeprefix("hf-hub:")
    try:
        return load_state_dict_from_hf(address, weights_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"detector.backbone.weights {weights!r} cannot be had from the hub: {error}; give a "
            "local file, or a cache in HF_HOME that holds them"
        ) from error


def _unwrapped(tree: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint: without what it is wrapped in, and what training put before."""
    while isinstance(tree, Mapping):
        inner = [tree[key] for key in WRAPPERS if isinstance(tree.get(key), Mapping)]
        if not inner:
            break
        tree = inner[0]
    if not isinstance(tree, Mapping):
        return {}
    cleaned = clean_state_dict(dict(tree))
    return {str(key): value for key, value in cleaned.items() if isinstance(value, Tensor)}


def _converted(
    state: dict[str, Tensor], full: nn.Module, weights: str, name: str
) -> dict[str, Tensor]:
    """timm's own converter of the model's family, where it has one."""
    convert = getattr(sys.modules[type(full).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        converted: dict[str, Tensor] = convert(state, full)
    except (KeyError, RuntimeError, AttributeError, ValueError, IndexError) as error:
        raise RecipeError(
            f"detector.backbone.weights {weights!r} are not of {name}: timm's converter stops at "
            f"{error!s}; give the file of the same model. It begins with {_some(sorted(state))}"
        ) from error
    return converted


def _compare(
    body: nn.Module, full: nn.Module, state: dict[str, Tensor], weights: str, name: str
) -> None:
    found = {_flat(key): tuple(tensor.shape) for key, tensor in state.items()}
    # Counters of batch norm are of no use here, and older files lack them.
    needed = {
        key: tuple(tensor.shape)
        for key, tensor in body.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    missing = [key for key in needed if _flat(key) not in found]
    wrong = [
        f"{key} {found[_flat(key)]} for {shape}"
        for key, shape in needed.items()
        if found.get(_flat(key), shape) != shape
    ]
    known = {_flat(key) for key in full.state_dict()}
    used = {_flat(key) for key in body.state_dict()}
    roots = {key.split(".")[0] for key in full.state_dict() if _flat(key) in used}
    # A deeper model's file fits in each tensor and has more of them; heads are nobody's here.
    extra = [key for key in state if _flat(key) not in known and key.split(".")[0] in roots]
    if missing or wrong or extra:
        kinds = (("missing", missing), ("of another shape", wrong), ("left over", extra))
        told = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds if keys)
        raise RecipeError(
            f"detector.backbone.weights {weights!r} are not of {name} ({told}); give the file of "
            "the same model, or its name in detector.backbone.name"
        )


def _flat(key: str) -> str:
    """timm's feature networks join the outer two names of a module by an underscore."""
    return key.replace(".", "_")


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
