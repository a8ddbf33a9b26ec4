"""First weights are those of the official code: Xavier in the transformer, prior, zero boxes."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.detectors.dino.detector import DinoDetector

XAVIER = [
    r"input_proj\.\d+\.0\.weight",
    r"(encoder|decoder)\.layers\.\d+\.ffn\.linear\d\.weight",
    r"(encoder|decoder)\.layers\.\d+\.\w+_attn\.(value_proj|output_proj|out_proj)\.weight",
    r"decoder\.layers\.\d+\.self_attn\.in_proj_weight",
    r"decoder\.ref_point_head\.layers\.\d\.weight",
    r"query_selection\.(enc_output\.weight|tgt_embed)",
]
NORMAL = [r"encoder\.level_embed", r"label_embed\.weight"]
FAN_IN = [
    r"(encoder_)?class_embed\.weight",
    r"(encoder_)?bbox_embed\.layers\.[01]\.(weight|bias)",
    r"(encoder|decoder)\.layers\.\d+\.ffn\.linear\d\.bias",
    r"decoder\.ref_point_head\.layers\.\d\.bias",
    r"query_selection\.enc_output\.bias",
]
ZERO = [
    r"input_proj\.\d+\.[01]\.bias",
    r".*norm\.bias",
    r".*_attn\.(sampling_offsets\.weight|attention_weights\.\w+)",
    r".*_attn\.(value_proj|output_proj|out_proj)\.bias",
    r".*\.in_proj_bias",
    r"(encoder_)?bbox_embed\.layers\.2\.\w+",
]
ONE = [r"input_proj\.\d+\.1\.weight", r".*norm\.weight"]
OTHER = [r"(encoder_)?class_embed\.bias", r".*\.sampling_offsets\.bias", r"backbone\..*"]
WIDTH = 64


@pytest.fixture
def detector(make_detector: Callable[..., DinoDetector]) -> DinoDetector:
    return make_detector(hidden_dim=WIDTH, class_head={"kind": "linear"})


def among(name: str, patterns: list[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def assert_uniform(values: Tensor, bound: float) -> None:
    assert values.abs().max() <= bound * (1 + 1e-6)
    if values.numel() > 500:
        assert abs(float(values.std()) / (bound / math.sqrt(3)) - 1) < 0.06
        assert abs(float(values.mean())) < 0.06 * bound


def fans(name: str, weight: Tensor) -> tuple[int, int]:
    receptive = math.prod(weight.shape[2:])
    return weight.shape[1] * receptive, weight.shape[0] * receptive


def test_each_parameter_starts_as_in_the_official_code(detector: DinoDetector) -> None:
    parameters = dict(detector.named_parameters())
    for name, value in parameters.items():
        if among(name, XAVIER):
            assert_uniform(value, math.sqrt(6 / sum(fans(name, value))))
        elif among(name, FAN_IN):
            weight = parameters[name.replace("bias", "weight")]
            assert_uniform(value, 1 / math.sqrt(fans(name, weight)[0]))
        elif among(name, NORMAL):
            assert abs(float(value.std()) - 1) < 0.12 and abs(float(value.mean())) < 0.12
        elif among(name, ZERO):
            assert (value == 0).all(), name
        elif among(name, ONE):
            assert (value == 1).all(), name
        else:
            assert among(name, OTHER), name
    for head in (detector.class_embed, detector.encoder_class_embed):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((12,), 0.01))


def test_encoder_heads_start_as_copies_of_the_decoder_s(detector: DinoDetector) -> None:
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (detector.class_embed, detector.encoder_class_embed),
        (detector.bbox_embed, detector.encoder_bbox_embed),
    ]
    for decoder, encoder in pairs:
        for a, b in zip(decoder.parameters(), encoder.parameters(), strict=True):
            assert torch.equal(a, b) and a is not b


def test_projections_of_the_language_head_have_richsem_s_spread(
    make_detector: Callable[..., DinoDetector],
) -> None:
    detector = make_detector(text_dim=100)
    for weight in (detector.class_embed.weight, detector.label_embed.weight):
        assert abs(float(weight.std()) - 0.1) < 0.01
