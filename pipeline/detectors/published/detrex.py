"""detrex's DINO (projects/dino), whose decoder layers have heads of their own."""

import re
from collections.abc import Mapping

from torch import Tensor

from pipeline.detectors.published.converted import Converted

_ATTENTION = r"(?P<tensor>(?:sampling_offsets|attention_weights|value_proj|output_proj)\.\w+)"
_EITHER = r"transformer\.(?P<stack>encoder|decoder)\.layers\.(?P<layer>\d+)\."
_ENCODER = _EITHER.replace("encoder|decoder", "encoder")
_DECODER = _EITHER.replace("encoder|decoder", "decoder")

_NAMES: tuple[tuple[str, str], ...] = (
    (r"neck\.convs\.(?P<level>\d+)\.conv\.(?P<tensor>\w+)", "input_proj.{level}.0.{tensor}"),
    (r"neck\.convs\.(?P<level>\d+)\.norm\.(?P<tensor>\w+)", "input_proj.{level}.1.{tensor}"),
    (r"transformer\.level_embeds", "encoder.level_embed"),
    (_ENCODER + r"attentions\.0\." + _ATTENTION, "encoder.layers.{layer}.self_attn.{tensor}"),
    (_ENCODER + r"norms\.0\.(?P<tensor>\w+)", "encoder.layers.{layer}.self_attn_norm.{tensor}"),
    (_ENCODER + r"norms\.1\.(?P<tensor>\w+)", "encoder.layers.{layer}.ffn_norm.{tensor}"),
    (
        _EITHER + r"ffns\.0\.layers\.0\.0\.(?P<tensor>\w+)",
        "{stack}.layers.{layer}.ffn.linear1.{tensor}",
    ),
    (
        _EITHER + r"ffns\.0\.layers\.1\.(?P<tensor>\w+)",
        "{stack}.layers.{layer}.ffn.linear2.{tensor}",
    ),
    (
        _DECODER + r"attentions\.0\.attn\.(?P<tensor>in_proj_\w+|out_proj\.\w+)",
        "decoder.layers.{layer}.self_attn.{tensor}",
    ),
    (_DECODER + r"attentions\.1\." + _ATTENTION, "decoder.layers.{layer}.cross_attn.{tensor}"),
    (_DECODER + r"norms\.0\.(?P<tensor>\w+)", "decoder.layers.{layer}.self_attn_norm.{tensor}"),
    (_DECODER + r"norms\.1\.(?P<tensor>\w+)", "decoder.layers.{layer}.cross_attn_norm.{tensor}"),
    (_DECODER + r"norms\.2\.(?P<tensor>\w+)", "decoder.layers.{layer}.ffn_norm.{tensor}"),
    (
        r"transformer\.decoder\.(?P<tensor>norm\.\w+|ref_point_head\.layers\.\d+\.\w+)",
        "decoder.{tensor}",
    ),
    (
        r"transformer\.(?P<tensor>enc_output\.\w+|enc_output_norm\.\w+)",
        "query_selection.{tensor}",
    ),
    (r"transformer\.tgt_embed\.weight", "query_selection.tgt_embed"),
    (r"label_enc\.weight", "label_embed.weight"),
)
_PATTERNS = tuple((re.compile(theirs), ours) for theirs, ours in _NAMES)
_EXTRA_LEVEL = re.compile(
    r"neck\.extra_convs\.(?P<level>\d+)\.(?P<part>conv|norm)\.(?P<tensor>\w+)"
)
_HEAD = re.compile(r"(?P<head>class_embed|bbox_embed)\.(?P<layer>\d+)\.(?P<tensor>.+)")
_AGAIN = "transformer.decoder."


def convert(state: Mapping[str, Tensor]) -> Converted:
    """Tensors of detrex's DINO under our names, for a detector with `shared_heads` false.

    Its class and box heads are one for each decoder layer, then the encoder's. The state dict has
    them all a second time, as the decoder's. The backbone is left to `published.convert`.
    """
    num_maps = len({name.split(".")[2] for name in state if name.startswith("neck.convs.")})
    heads = [found for name in state if (found := _HEAD.fullmatch(name))]
    encoder_head = max((int(found["layer"]) for found in heads), default=0)
    converted = Converted({}, {}, {})
    for name, tensor in state.items():
        ours = _our_name(name, num_maps, encoder_head)
        if name.startswith(_AGAIN) and name.removeprefix(_AGAIN) in state:
            converted.dropped[name] = "a head's second name"
        elif ours is not None:
            converted.weights[ours] = tensor
            converted.names[ours] = name
    return converted


def _our_name(name: str, num_maps: int, encoder_head: int) -> str | None:
    if level := _EXTRA_LEVEL.fullmatch(name):
        number, part = num_maps + int(level["level"]), ("conv", "norm").index(level["part"])
        return f"input_proj.{number}.{part}.{level['tensor']}"
    if head := _HEAD.fullmatch(name):
        if int(head["layer"]) == encoder_head:
            return f"encoder_{head['head']}.{head['tensor']}"
        return name
    for pattern, ours in _PATTERNS:
        if found := pattern.fullmatch(name):
            return ours.format(**found.groupdict())
    return None
