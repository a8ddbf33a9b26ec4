"""Weights of the official RichSem (github.com/MengLcool/RichSem, models/richsem)."""

import re
from collections.abc import Mapping

from torch import Tensor

from pipeline.detectors.published.converted import Converted
from pipeline.detectors.published.shared import common_name, rename
from pipeline.errors import DataError

_HEADS = {
    "class_embed.dino_visual_proj.weight": "class_embed.weight",
    "transformer.enc_out_class_embed.dino_visual_proj.weight": "encoder_class_embed.weight",
    "class_embed.label_proj.weight": "label_embed.weight",
}
_BRANCH = "class_embed.clip_visual_proj.weight"
_CLIP = re.compile(r"(?:class_embed|transformer\.enc_out_class_embed)\.(clip\.|logit_scale$)")
_OTHER_HEAD = re.compile(r"class_embed\.(\d+\.|\w+_visual_proj\.layers\.)")


def convert(state: Mapping[str, Tensor]) -> Converted:
    """The model's state in our names, for `class_head: {kind: language, bias: false}`.

    Their classes stand in the text embeddings, which are no part of the state: column 0 of theirs,
    "none", is absent where the detector is given those of the real categories alone. Their label
    projection reads the text embeddings without normalisation, and so does ours, if it is given
    such. The semantic branch's projection is dropped here: a branch is trained, never used. Raises
    `DataError` for a model without language head or with heads of several layers.
    """
    for name in state:
        if _OTHER_HEAD.match(name):
            raise DataError(
                f"{name}: this RichSem model has another class head than one linear projection "
                "into CLIP's space; import one that was trained with use_language: True and "
                "use_mlp_proj: False, as richsem_4scale.py is"
            )
    return rename(state, _our_name, _drop_reason)


def _our_name(name: str) -> str | None:
    return _HEADS.get(name) or common_name(name)


def _drop_reason(name: str) -> str | None:
    if name == _BRANCH:
        return "the semantic branch's projection, of use in training only"
    if clip := _CLIP.match(name):
        if clip[1] == "clip.":
            return "a copy of CLIP, which is the teacher's"
        return "CLIP's temperature, which is the recipe's detector.class_head.scale"
    return None
