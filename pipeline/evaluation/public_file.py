"""Checkpoints of public code, read without executing anything that they hold."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import DataError, RecipeError, StorageError

MODEL = "model"
AVERAGES = ("ema_model", "ema_state")
"""Names of averaged weights: DINO's and RichSem's, detrex's."""
_DDP = "module."


class PublicFile(NamedTuple):
    """What a public checkpoint holds of a model.

    `state` has its tensors by their names, `part` says which of the file's states that is, `others`
    what else could have been taken; `arguments` are those of the training, or empty.
    """

    state: dict[str, Tensor]
    part: str
    others: list[str]
    arguments: dict[str, Any]


def read_public_file(path: Path, *, ema: bool = False) -> PublicFile:
    """Read a `.pth` or safetensors file; `ema` takes the averaged weights in it.

    Raises `RecipeError` where there is no such file, `DataError` for a pickle that would have to be
    executed or a file without a model's tensors, and `StorageError` for one that cannot be read.
    """
    if not path.is_file():
        raise RecipeError(f"{path} is no file; give a checkpoint of the public code, a .pth")
    if path.suffix == ".pkl":
        raise DataError(
            f"{path} is a pickle, which runs code when it is read (detectron2 keeps its ImageNet "
            "backbones so); read it where you trust it and save its tensors by torch.save as a .pth"
        )
    tree = _read(path)
    state, part, others = _choose(tree, path, ema=ema)
    arguments = tree.get("args")
    known = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return PublicFile(state, part, others, dict(known))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # DINO and RichSem save their arguments beside the weights: names and plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None
            )
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        found = reason.partition("Unsupported global: GLOBAL ")[2].split(" ")[0]
        raise DataError(
            f"{path} holds more than tensors and plain values"
            f"{f' ({found})' if found else ''}, and is not executed to read it; load it where you "
            "trust it, and save its state dict alone: torch.save({'model': tensors}, FILE)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"{path} cannot be read: it is damaged, or nothing that torch.save has written "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error
    if not isinstance(tree, Mapping):
        raise DataError(f"{path} holds a {type(tree).__name__}, not a model's state by name")
    return tree


def _choose(
    tree: Mapping[str, Any], path: Path, *, ema: bool
) -> tuple[dict[str, Tensor], str, list[str]]:
    """The state to take, by the key that it has in the file."""
    states = [key for key in (MODEL, *AVERAGES) if isinstance(tree.get(key), Mapping)]
    averaged = [key for key in states if key != MODEL]
    if ema and not averaged:
        raise DataError(
            f"{path} has no averaged weights ({' or '.join(AVERAGES)}), which --ema asks for; it "
            f"has {', '.join(map(str, list(tree)[:10])) or 'nothing'}. Leave --ema out"
        )
    part = averaged[0] if ema else next(iter(states), "")
    inner = tree[part] if part else tree
    tensors = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
    if not tensors or (not part and len(tensors) < len(inner)):
        raise DataError(
            f"{path} has no model's state: neither {MODEL!r} nor names of tensors alone, but "
            f"{', '.join(map(str, list(inner)[:10])) or 'nothing'}"
        )
    # DistributedDataParallel's prefix; averages of a wrapped model have it too.
    if all(name.startswith(_DDP) for name in tensors):
        tensors = {name.removeprefix(_DDP): tensor for name, tensor in tensors.items()}
    state = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return state, part or "the file's own tensors", [key for key in states if key != part]
