"""The detector section that converted weights fit, read from their shapes."""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from pipeline.errors import DataError
from pipeline.recipe import Backbone, ClassHead, Denoising, DetectorSection, Losses

_BODY = "backbone.body."
_STAGE_BLOCK = re.compile(r"backbone\.body\.(?:layer|layers_)(\d)\.(?:blocks\.)?(\d+)\.")

_RESNETS = {
    "basic [2, 2, 2, 2]": "resnet18",
    "basic [3, 4, 6, 3]": "resnet34",
    "bottleneck [3, 4, 6, 3]": "resnet50",
    "bottleneck [3, 4, 23, 3]": "resnet101",
}
_SWINS = {
    "96 wide, [2, 2, 6, 2], window 7": "swin_tiny_patch4_window7_224",
    "96 wide, [2, 2, 18, 2], window 7": "swin_small_patch4_window7_224",
    "128 wide, [2, 2, 18, 2], window 7": "swin_base_patch4_window7_224",
    "128 wide, [2, 2, 18, 2], window 12": "swin_base_patch4_window12_384",
    "192 wide, [2, 2, 18, 2], window 7": "swin_large_patch4_window7_224",
    "192 wide, [2, 2, 18, 2], window 12": "swin_large_patch4_window12_384",
}

_DEFAULT_POINTS = 4
_TEMPERATURE = 20.0
_TEXT_SCALE = 100.0


def infer_section(
    origin: str, weights: Mapping[str, Tensor], arguments: Mapping[str, object]
) -> DetectorSection:
    """The detector whose state dict has these tensors.

    `arguments` are those that the model was trained with, where its file has them. They say what
    shapes cannot: heads against points (4 points without them), temperatures and noise. Raises
    `DataError` where a tensor that decides is missing, or for an option that we do not have.
    """
    _refuse_options(arguments)
    level_embed = _tensor(weights, "encoder.level_embed")
    levels, dim = level_embed.shape
    attention = _tensor(weights, "decoder.layers.0.cross_attn.attention_weights.weight")
    points = _integer(arguments, "enc_n_points", _DEFAULT_POINTS)
    heads = _integer(arguments, "nheads", len(attention) // (levels * points))
    maps = _num_maps(weights)
    detrex = origin == "detrex"
    return DetectorSection(
        backbone=infer_backbone(weights, maps).model_copy(
            update={"frozen_stages": _frozen_stages(origin, weights, arguments)}
        ),
        hidden_dim=dim,
        num_heads=heads,
        num_points=points,
        num_feature_levels=levels,
        encoder_layers=_count(weights, r"encoder\.layers\.(\d+)\."),
        decoder_layers=_count(weights, r"decoder\.layers\.(\d+)\."),
        ffn_dim=len(_tensor(weights, "decoder.layers.0.ffn.linear1.weight")),
        num_queries=len(_tensor(weights, "query_selection.tgt_embed")),
        shared_heads=not detrex,
        position_temperature=_number(
            arguments, "pe_temperatureH", 10000.0 if detrex else _TEMPERATURE
        ),
        position_offset=-0.5 if detrex else 0.0,
        class_head=_class_head(origin, weights),
        denoising=Denoising(
            num_queries=2 * _integer(arguments, "dn_number", 100),
            label_noise=_number(arguments, "dn_label_noise_ratio", 0.5),
            box_noise=_number(arguments, "dn_box_noise_scale", 1.0),
        ),
        losses=Losses(federated_categories=_federated_categories(origin, arguments)),
    )


def _federated_categories(origin: str, arguments: Mapping[str, object]) -> int:
    if origin != "richsem" or not arguments.get("use_fed_loss", True):
        return 0
    return _integer(arguments, "fed_num_sample_cats", 50)


def infer_backbone(weights: Mapping[str, Tensor], num_maps: int) -> Backbone:
    """The backbone by its depths and widths, with as many maps as there are projections of."""
    blocks: dict[int, set[int]] = {}
    for parameter in weights:
        if found := _STAGE_BLOCK.match(parameter):
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))
    depths = [len(blocks[stage]) for stage in sorted(blocks)]
    swin = f"{_BODY}patch_embed.proj.weight" in weights
    shape, known = _swin_shape(weights, depths) if swin else _resnet_shape(weights, depths)
    if shape not in known:
        raise DataError(
            f"the backbone's blocks are {shape}, which is none that can be imported: "
            f"{', '.join(f'{name} ({its})' for its, name in known.items())}"
        )
    end = 4 if swin else 5
    # No weights of timm's: those that are imported take their place.
    return Backbone(name=known[shape], weights=None, out_indices=list(range(end - num_maps, end)))


def _frozen_stages(
    origin: str, weights: Mapping[str, Tensor], arguments: Mapping[str, object]
) -> int:
    """Leading stages that the origin's own configuration does not train, the stem included."""
    if f"{_BODY}patch_embed.proj.weight" in weights:
        return 0
    if origin == "detrex":
        return 1
    # RichSem trains all of the ResNet that was trained on ImageNet-21k.
    return 0 if arguments.get("resnet_pretrain_path") else 2


def _swin_shape(weights: Mapping[str, Tensor], depths: list[int]) -> tuple[str, Mapping[str, str]]:
    table = _tensor(weights, f"{_BODY}layers_0.blocks.0.attn.relative_position_bias_table")
    window = (math.isqrt(len(table)) + 1) // 2
    width = len(_tensor(weights, f"{_BODY}patch_embed.proj.weight"))
    return f"{width} wide, {depths}, window {window}", _SWINS


def _resnet_shape(
    weights: Mapping[str, Tensor], depths: list[int]
) -> tuple[str, Mapping[str, str]]:
    bottleneck = f"{_BODY}layer1.0.conv3.weight" in weights
    return f"{'bottleneck' if bottleneck else 'basic'} {depths}", _RESNETS


def _class_head(origin: str, weights: Mapping[str, Tensor]) -> ClassHead:
    if origin != "richsem":
        return ClassHead(kind="linear")
    return ClassHead(kind="language", scale=_TEXT_SCALE, bias="class_embed.bias" in weights)


def _num_maps(weights: Mapping[str, Tensor]) -> int:
    """How many levels are maps of the backbone: those whose projection has a 1x1 kernel."""
    projections = [
        tensor
        for name, tensor in weights.items()
        if re.fullmatch(r"input_proj\.\d+\.0\.weight", name)
    ]
    return sum(tensor.shape[-1] == 1 for tensor in projections)


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in weights if (found := re.match(pattern, name))})


def _tensor(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise DataError(
            f"the file has no tensor for our {name}, without which the architecture is unknown; "
            "give the whole state of a two-stage DINO with learned content queries"
        )
    return weights[name]


def _refuse_options(arguments: Mapping[str, object]) -> None:
    """Options of the DINO family that change what is computed with the same tensors, and that we do
    not have."""
    rules = (
        ("dilation", False),
        ("pre_norm", False),
        ("query_dim", 4),
        ("transformer_activation", "relu"),
        ("decoder_module_seq", ["sa", "ca", "ffn"]),
        ("dec_n_points", arguments.get("enc_n_points", _DEFAULT_POINTS)),
        ("pe_temperatureW", arguments.get("pe_temperatureH", _TEMPERATURE)),
        ("use_detached_boxes_dec_out", False),
    )
    for key, ours in rules:
        if arguments.get(key, ours) != ours:
            raise DataError(
                f"the model was trained with {key} {arguments[key]!r}, and this detector takes "
                f"only {ours!r}: its outputs would be others"
            )


def _integer(arguments: Mapping[str, object], key: str, default: int) -> int:
    value = arguments.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"the file's arguments have {key} {value!r}, which is no whole number")
    return value


def _number(arguments: Mapping[str, object], key: str, default: float) -> float:
    value = arguments.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise DataError(f"the file's arguments have {key} {value!r}, which is no number")
    return float(value)
