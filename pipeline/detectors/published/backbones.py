"""Names of backbone parameters in public detectors, as timm and so our backbone have them."""

import re
from collections.abc import Iterable

_BACKBONE = "backbone."

# torchvision's ResNet and timm's share their names. DETR's family keeps the backbone in
# `backbone.0`, a ResNet in its `body`; detrex has no such levels.
_RESNET = re.compile(
    r"(?P<stem>conv1\.weight|bn1\.\w+)"
    r"|layer(?P<stage>[1-4])\.(?P<block>\d+)\.(?P<rest>(?:conv|bn)[123]\.\w+|downsample\.[01]\.\w+)"
)

# detectron2 counts stages from res2 and keeps each norm inside its convolution.
_DETECTRON2 = re.compile(
    r"(?:stem|res(?P<stage>[2-5])\.(?P<block>\d+))\."
    r"(?P<part>conv[123]|shortcut)\.(?P<norm>norm\.)?(?P<tensor>\w+)"
)

# The Swin of detection code merges patches at the end of a stage, timm's at the start of the next.
_SWIN = re.compile(
    r"(?P<embedding>patch_embed\.(?:proj|norm)\.\w+)"
    r"|layers\.(?P<stage>\d)\.(?:(?P<block>blocks\.\d+\..+)|downsample\.(?P<merging>.+))"
)
_OUTPUT_NORM = re.compile(r"norm(?P<stage>\d)\.(?P<tensor>weight|bias)")

_RECOMPUTED = ("relative_position_index", "attn_mask")


def backbone_name(name: str, first_map: int = 0) -> str | None:
    """Our name of a public detector's backbone tensor, or None where it is none that we know.

    Known are ResNets, as torchvision and timm name them (DINO, RichSem) and as detectron2 does
    (detrex), and Swin, whose output norms are those of maps from stage `first_map` on.
    """
    inner = name.removeprefix(_BACKBONE)
    if inner == name:
        return None
    inner = inner.removeprefix("0.").removeprefix("body.")
    if norm := _OUTPUT_NORM.fullmatch(inner):
        return f"{_BACKBONE}output_norms.{int(norm['stage']) - first_map}.{norm['tensor']}"
    ours = _resnet(inner) or _detectron2(inner) or _swin(inner)
    return None if ours is None else f"{_BACKBONE}body.{ours}"


def first_output_norm(names: Iterable[str]) -> int:
    """The stage of the first map that has an output norm, or 0."""
    inner = (name.removeprefix(_BACKBONE).removeprefix("0.") for name in names)
    found = (_OUTPUT_NORM.fullmatch(name) for name in inner)
    return min((int(norm["stage"]) for norm in found if norm), default=0)


def drop_reason(name: str) -> str | None:
    """Why a public detector's backbone tensor isn't needed, or None where it is."""
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return "counts batches of a norm whose statistics are fixed"
    if last in _RECOMPUTED:
        return "a table that the backbone computes again"
    return None


def _resnet(name: str) -> str | None:
    return name if _RESNET.fullmatch(name) else None


def _detectron2(name: str) -> str | None:
    found = _DETECTRON2.fullmatch(name)
    if found is None:
        return None
    part, norm, tensor = found["part"], found["norm"], found["tensor"]
    if part == "shortcut":
        ours = f"downsample.{1 if norm else 0}.{tensor}"
    else:
        ours = f"{'bn' if norm else 'conv'}{part[-1]}.{tensor}"
    if found["stage"] is None:
        return ours
    return f"layer{int(found['stage']) - 1}.{found['block']}.{ours}"


def _swin(name: str) -> str | None:
    found = _SWIN.fullmatch(name)
    if found is None:
        return None
    if found["embedding"]:
        return found["embedding"]
    stage = int(found["stage"])
    if found["merging"]:
        return f"layers_{stage + 1}.downsample.{found['merging']}"
    return f"layers_{stage}.{found['block']}"
