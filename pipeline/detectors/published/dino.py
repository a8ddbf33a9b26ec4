"""Weights of the official DINO (github.com/IDEA-Research/DINO, models/dino)."""

import re
from collections.abc import Mapping

from torch import Tensor

from pipeline.detectors.published.converted import Converted
from pipeline.detectors.published.shared import common_name, rename
from pipeline.errors import DataError

_CLASS_HEAD = re.compile(r"(?:transformer\.decoder\.)?class_embed\.\d+\.(weight|bias)")
_LABELS = "label_enc.weight"


def convert(state: Mapping[str, Tensor]) -> Converted:
    """The model's state in our names, for `class_head.kind: linear`.

    Columns of the class heads and rows of the label embedding stay in their order, in which COCO
    has a column for each id up to 90. Raises `DataError` where decoder layers do not share their
    heads, and for labels that do not fit the classes.
    """
    converted = rename(state, _our_name, lambda name: None)
    _cut_labels(converted)
    return converted


def _our_name(name: str) -> str | None:
    if head := _CLASS_HEAD.fullmatch(name):
        return f"class_embed.{head[1]}"
    if name.startswith("transformer.enc_out_class_embed."):
        return f"encoder_class_embed.{name.removeprefix('transformer.enc_out_class_embed.')}"
    if name == _LABELS:
        return "label_embed.weight"
    return common_name(name)


def _cut_labels(converted: Converted) -> None:
    """Leave one row of the label embedding for each class: theirs has a spare one at the end."""
    labels, classes = (converted.weights.get(f"{n}.weight") for n in ("label_embed", "class_embed"))
    if labels is None or classes is None:
        return
    if len(labels) < len(classes):
        raise DataError(
            f"{_LABELS} has {len(labels)} rows for {len(classes)} classes; import a model whose "
            "dn_labelbook_size is its num_classes"
        )
    converted.weights["label_embed.weight"] = labels[: len(classes)]
    if len(labels) > len(classes):
        rows = f"{_LABELS}[{len(classes)}:]"
        converted.dropped[rows] = "rows after the last class, which no label means"
