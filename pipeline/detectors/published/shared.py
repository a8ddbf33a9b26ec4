"""Names that DINO and RichSem have in common: backbone, projections, transformer, box heads."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.detectors.published.converted import Converted
from pipeline.errors import DataError

_NORMS = {
    "encoder": {"1": "self_attn_norm", "2": "ffn_norm"},
    "decoder": {"1": "cross_attn_norm", "2": "self_attn_norm", "3": "ffn_norm"},
}
_LAYER = re.compile(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(.+)")
_BOX_HEAD = re.compile(
    r"(?:transformer\.decoder\.)?bbox_embed\.\d+\.(layers\.\d+\.(?:weight|bias))"
)
_PREFIXES = {
    "input_proj.": "input_proj.",
    "transformer.decoder.norm.": "decoder.norm.",
    "transformer.decoder.ref_point_head.": "decoder.ref_point_head.",
    "transformer.enc_output.": "query_selection.enc_output.",
    "transformer.enc_output_norm.": "query_selection.enc_output_norm.",
    "transformer.enc_out_bbox_embed.": "encoder_bbox_embed.",
}
_WHOLE = {
    "transformer.level_embed": "encoder.level_embed",
    "transformer.tgt_embed.weight": "query_selection.tgt_embed",
}


def common_name(name: str) -> str | None:
    """Our name of a tensor that both public detectors have under this name, or None."""
    if name in _WHOLE:
        return _WHOLE[name]
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if box := _BOX_HEAD.fullmatch(name):
        return f"bbox_embed.{box[1]}"
    if layer := _LAYER.fullmatch(name):
        return f"{layer[1]}.layers.{layer[2]}.{_inside_layer(layer[1], layer[3])}"
    return None


def _inside_layer(stack: str, name: str) -> str:
    part, _, rest = name.partition(".")
    if part in ("linear1", "linear2"):
        return f"ffn.{name}"
    if part.startswith("norm"):
        return f"{_NORMS[stack].get(part.removeprefix('norm'), part)}.{rest}"
    return name


def rename(
    state: Mapping[str, Tensor],
    our_name: Callable[[str], str | None],
    drop_reason: Callable[[str], str | None],
) -> Converted:
    """Everything in `state` that has a name with us, or a reason to be dropped.

    Several of their names may stand for one tensor of ours, as modules of theirs that share their
    weights are stored once for each place; raises `DataError` where those differ.
    """
    converted = Converted({}, {}, {})
    for theirs in sorted(state, key=lambda name: (name.count("."), name)):
        reason = drop_reason(theirs)
        ours = None if reason else our_name(theirs)
        if reason:
            converted.dropped[theirs] = reason
        elif ours is None:
            continue
        elif ours not in converted.weights:
            converted.weights[ours], converted.names[ours] = state[theirs], theirs
        elif _equal(converted.weights[ours], state[theirs]):
            converted.dropped[theirs] = f"the same tensor as {converted.names[ours]}"
        else:
            raise DataError(
                f"{converted.names[ours]} and {theirs} differ, but our detector has one {ours} for "
                "both: all decoder layers share their class and box heads. Import a model that was "
                "trained with dec_pred_class_embed_share and dec_pred_bbox_embed_share"
            )
    return converted


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())
