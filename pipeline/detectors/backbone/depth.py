"""Where the parameters of a body stand in depth: stages that freeze, layers that decay.

Stage 0 is the stem: what images pass before the first block, with positional embeddings and class
tokens. The stages after it are those of the model; a plain ViT has none, so its blocks are divided
into four runs of equal length. A layer is a block; what stands before the blocks of a stage
(downsampling) belongs to the first of them, and the stem is layer 0.
"""

from itertools import pairwise
from typing import NamedTuple

from timm.models import FeatureInfo
from torch import nn

VIT_STAGES = 4


class Stage(NamedTuple):
    """A stage after the stem: names of the modules that it spans, and of its blocks in order."""

    modules: tuple[str, ...]
    blocks: tuple[str, ...]


class Place(NamedTuple):
    """Of a parameter: its stage and its layer, 0 in the stem."""

    stage: int
    layer: int


def stages_of_pyramid(body: nn.Module) -> list[Stage]:
    """Stages of a timm feature network, by its own feature information."""
    info = body.feature_info
    assert isinstance(info, FeatureInfo)
    modules = dict(body.named_modules())
    parameters = [name for name, _ in body.named_parameters()]
    stages = []
    for entry in info.info:
        # timm joins the names of modules that it takes out of a Sequential.
        names = (entry["module"], entry["module"].replace(".", "_"))
        found = [name for name in names if name in modules]
        if found and any(parameter.startswith(f"{found[0]}.") for parameter in parameters):
            stages.append(Stage((found[0],), _blocks(found[0], modules[found[0]])))
    return stages


def _blocks(name: str, module: nn.Module) -> tuple[str, ...]:
    inner = getattr(module, "blocks", None)
    if isinstance(inner, nn.Module):
        return tuple(f"{name}.blocks.{child}" for child, _ in inner.named_children())
    if isinstance(module, nn.Sequential):
        return tuple(f"{name}.{child}" for child, _ in module.named_children())
    return (name,)


def stages_of_vit(num_blocks: int) -> list[Stage]:
    """Four runs of a plain ViT's blocks, of lengths that differ by one at most."""
    ends = [round(num_blocks * i / VIT_STAGES) for i in range(VIT_STAGES + 1)]
    stages = []
    for start, end in pairwise(ends):
        blocks = tuple(f"blocks.{i}" for i in range(start, end))
        stages.append(Stage(blocks, blocks))
    return stages


def places(body: nn.Module, stages: list[Stage]) -> dict[str, Place]:
    """Stage and layer of each parameter of the body, by name.

    timm registers modules in the order of their use; what lies between two stages belongs to the
    earlier one.
    """
    layer_of: dict[str, int] = {}
    for stage in stages:
        for block in stage.blocks:
            layer_of[block] = len(layer_of) + 1
    found: dict[str, Place] = {}
    current = 0
    for name, _ in body.named_parameters():
        for i, stage in enumerate(stages, start=1):
            if _within(name, stage.modules):
                current = i
        blocks = stages[current - 1].blocks if current else ()
        own = [layer_of[block] for block in blocks if _within(name, (block,))]
        first = layer_of[blocks[0]] if blocks else 0
        found[name] = Place(current, own[0] if own else first)
    return found


def num_layers(stages: list[Stage]) -> int:
    """Blocks of all stages together."""
    return sum(len(stage.blocks) for stage in stages)


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
