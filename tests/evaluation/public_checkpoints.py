"""Checkpoints as the public code saves them: small random detectors on a ResNet-18."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

REFERENCES = Path(__file__).parents[1] / "detectors" / "references"
CHANNELS = (128, 256, 512)
ORIGINS = ("dino", "richsem", "detrex")
CATEGORIES = 12
COCO_IDS = [1, 2, 3, 5, 8, 11]
"""Some ids of a model with a column for each id up to 11."""


def reference_state(origin: str) -> dict[str, Tensor]:
    """The state of the parity tests, whose feature maps had other widths than a ResNet's."""
    files = {"dino": "dino_4scale", "richsem": "richsem", "detrex": "detrex_weights"}
    arrays = load_file(REFERENCES / f"{files[origin]}.safetensors")
    prefix = "" if origin == "detrex" else "state/"
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in arrays.items()
        if name.startswith(prefix)
    }
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def public_state(origin: str) -> dict[str, Tensor]:
    """A whole detector's state under the names of the origin."""
    state, generator = reference_state(origin), torch.Generator().manual_seed(5)
    pattern = r"neck\.(?:extra_)?convs\.\d\.conv\.weight|input_proj\.\d\.0\.weight"
    projections = sorted(name for name in state if re.fullmatch(pattern, name))
    projections.sort(key=lambda name: "extra" in name)
    for name, width in zip(projections, (*CHANNELS, CHANNELS[-1]), strict=True):
        dim, _, *kernel = state[name].shape
        state[name] = 0.05 * torch.randn(dim, width, *kernel, generator=generator)
    torch.manual_seed(6)
    backbone = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d).state_dict()
    for name, tensor in backbone.items():
        if not name.startswith("fc."):
            state[_detectron2(name) if origin == "detrex" else f"backbone.0.body.{name}"] = tensor
    return state


def _detectron2(name: str) -> str:
    """torchvision's name as detectron2 has it."""
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"bn(\d)\.", r"conv\1.norm.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return f"backbone.{name}"


def save(folder: Path, state: dict[str, Tensor], **others: Any) -> Path:
    """A `.pth` as the training code writes it."""
    path = folder / "checkpoint.pth"
    torch.save({"model": state, "epoch": 11, "optimizer": {"state": {}}, **others}, path)
    return path


def training_arguments(**changes: Any) -> argparse.Namespace:
    """Some of what DINO and RichSem save beside the weights."""
    given = {"nheads": 4, "enc_n_points": 2, "dec_n_points": 2, "dn_number": 6, "lr": 1e-4}
    return argparse.Namespace(**(given | changes))
