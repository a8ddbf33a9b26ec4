"""Weights of public detectors under our names, and the one place that chooses among them."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from pipeline.detectors.published import detrex, dino, richsem
from pipeline.detectors.published.backbones import (
    backbone_name,
    drop_reason,
    first_output_norm,
)
from pipeline.detectors.published.converted import Converted

CONVERT: Mapping[str, Callable[[Mapping[str, Tensor]], Converted]] = {
    "dino": dino.convert,
    "richsem": richsem.convert,
    "detrex": detrex.convert,
}
"""Where weights can come from, and how all but the backbone is renamed."""

_BACKBONE = "backbone."
# One name of each that no other has; the first that fits is taken.
_MARKS = {
    "detrex": "transformer.encoder.layers.0.attentions.0.",
    "richsem": "class_embed.dino_visual_proj.",
    "dino": "transformer.encoder.layers.0.self_attn.",
}


def convert(origin: str, state: Mapping[str, Tensor]) -> Converted:
    """A whole public detector of one of the origins, its backbone included, under our names.

    Pure: tensors are passed on as they are. Raises `DataError` as the origin's own `convert` does.
    """
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(_BACKBONE)}
    converted = CONVERT[origin](rest)
    first = first_output_norm(state)
    for name in state:
        if name in rest:
            continue
        reason, ours = drop_reason(name), backbone_name(name, first)
        if reason is not None:
            converted.dropped[name] = reason
        elif ours is not None:
            converted.weights[ours] = state[name]
            converted.names[ours] = name
    return converted


def recognise(names: Iterable[str]) -> str | None:
    """The origin whose names these are, or None."""
    listed = list(names)
    for origin, mark in _MARKS.items():
        if any(name.startswith(mark) for name in listed):
            return origin
    return None
