import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.detectors.backbone import FeatureMap
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.dino.transformer import (
    Memory,
    Queries,
    anchor_boxes,
    box_position,
    flatten_maps,
    map_position,
)
from pipeline.detectors.interface import Predictions

SIZES = [(6, 8), (3, 4), (2, 2)]


def feature_maps(padding: int) -> list[FeatureMap]:
    """Maps of one image and levels, the whole maps being `padding` cells larger than the image."""
    maps = []
    for level, (height, width) in enumerate(SIZES):
        generator = torch.Generator().manual_seed(level)
        features = torch.randn(1, 32, height, width, generator=generator)
        wider = F.pad(features, (0, padding, 0, 2 * padding), value=50.0)
        mask = F.pad(torch.zeros(1, height, width), (0, padding, 0, 2 * padding), value=1.0)
        maps.append(FeatureMap(wider, mask.bool()))
    return maps


def encode(detector: DinoDetector, maps: list[FeatureMap]) -> Memory:
    positions = [map_position(level.mask, detector.feature_dim) for level in maps]
    with torch.no_grad():
        memory = detector.encoder(flatten_maps(maps), positions)
    assert isinstance(memory, Memory)
    return memory


def predict(detector: DinoDetector, maps: list[FeatureMap]) -> Predictions:
    positions = [map_position(level.mask, detector.feature_dim) for level in maps]
    memory = detector.encoder(flatten_maps(maps), positions)
    queries, _ = detector.query_selection(memory, detector._best_score, detector.encoder_bbox_embed)
    return detector._predict(queries, memory)


def test_more_padding_does_not_change_the_image_s_cells(
    make_detector: Callable[..., DinoDetector],
) -> None:
    """Queries do change: their positions count the padding, and cells of padding are selected."""
    detector = make_detector(num_feature_levels=3, encoder_layers=2)
    for layer in detector.encoder.layers:
        nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.2)
        nn.init.normal_(layer.self_attn.attention_weights.weight)
    expected = encode(detector, feature_maps(0))
    for padding in (1, 5):
        memory = encode(detector, feature_maps(padding))
        cells = memory.features[~memory.mask][None]
        torch.testing.assert_close(cells, expected.features, atol=1e-4, rtol=1e-4)
        anchors, usable = anchor_boxes(memory)
        torch.testing.assert_close(anchors[~memory.mask][None], anchor_boxes(expected)[0])
        assert not usable[memory.mask].any()


def test_query_positions_count_the_padding_of_the_first_level(
    make_detector: Callable[..., DinoDetector],
) -> None:
    detector = make_detector(num_feature_levels=3)
    memory = encode(detector, feature_maps(1))
    seen: list[Tensor] = []
    detector.decoder.ref_point_head.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]])
    detector.decoder(Queries(torch.zeros(1, 1, 32), boxes), memory, [detector.bbox_embed] * 2, None)
    # 6x8 cells of image in a first level of 8x9.
    expected = box_position(boxes * torch.tensor([8 / 9, 6 / 8, 8 / 9, 6 / 8]), 32)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("width", [51, 67, 75, 97])
def test_anchors_on_the_limit_are_not_moved_by_rounding(width: int) -> None:
    """The outer cells of 50 stand at 0.01 and 0.99 exactly, which is outside, however wide the
    map is with its padding."""
    mask = torch.zeros(1, 20, width, dtype=torch.bool)
    mask[:, :, 50:] = True
    _, usable = anchor_boxes(flatten_maps([FeatureMap(torch.zeros(1, 32, 20, width), mask)]))
    assert usable.view(20, width).sum(1).tolist() == [48] * 20


def test_cells_of_padding_are_in_the_running(make_detector: Callable[..., DinoDetector]) -> None:
    """As in the official code: they all have the features of a cell of zeros, and the corner."""
    detector = make_detector(num_feature_levels=3)
    selection, memory = detector.query_selection, encode(detector, feature_maps(1))
    zeros = selection.enc_output_norm(selection.enc_output.bias)
    chosen = selection(memory, lambda cells: -(cells - zeros).abs().sum(-1), lambda x: x[..., :4])
    queries, cells = chosen
    torch.testing.assert_close(queries.boxes, torch.ones_like(queries.boxes))
    torch.testing.assert_close(cells.content, zeros.expand_as(cells.content))


def test_map_position_follows_the_formula() -> None:
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[:, 3:], mask[:, :, 4:] = True, True
    position = map_position(mask, 16).view(4, 5, 16)
    for row, column, channel in [(0, 0, 0), (2, 1, 3), (1, 3, 9), (2, 2, 14)]:
        along_y, k = channel < 8, channel % 8
        place = (row + 1) / 3 if along_y else (column + 1) / 4
        angle = place * 2 * math.pi / 20 ** (2 * (k // 2) / 8)
        expected = math.sin(angle) if k % 2 == 0 else math.cos(angle)
        assert math.isclose(float(position[row, column, channel]), expected, abs_tol=1e-5)


def test_box_position_is_in_the_order_y_x_w_h() -> None:
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    parts = box_position(box, 8).view(4, 4)
    first = [math.sin(2 * math.pi * value) for value in (0.2, 0.1, 0.3, 0.4)]
    torch.testing.assert_close(parts[:, 0], torch.tensor(first))


def test_anchors_sit_on_cells_and_avoid_padding() -> None:
    memory = flatten_maps(feature_maps(1))
    logits, usable = anchor_boxes(memory)
    boxes = logits[0].sigmoid()
    # Cell (row 1, column 2) of the first level, of 6x8 cells of image in a map of 8x9.
    expected = torch.tensor([2.5 / 8, 1.5 / 6, 0.05, 0.05])
    torch.testing.assert_close(boxes[1 * 9 + 2], expected)
    assert not usable[0][memory.mask[0]].any()
    assert usable.sum() == sum(h * w for h, w in SIZES)
    second = 8 * 9
    torch.testing.assert_close(boxes[second, 2:], torch.tensor([0.1, 0.1]))


def test_boxes_start_as_anchors_and_look_forward_twice(
    make_detector: Callable[..., DinoDetector],
) -> None:
    """The second layer's box loss reaches the first layer's refinement, but not the queries'."""
    detector = make_detector(num_feature_levels=3, decoder_layers=2)
    maps = feature_maps(0)
    memory = detector.encoder(flatten_maps(maps), [map_position(m.mask, 32) for m in maps])
    queries, cells = detector.query_selection(
        memory, detector._best_score, detector.encoder_bbox_embed
    )
    anchors = anchor_boxes(memory)[0].sigmoid()
    distance = torch.cdist(queries.boxes, anchors).amin(-1)
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=1e-4, rtol=0)
    assert not queries.boxes.requires_grad and cells.boxes.requires_grad
    calls: list[Tensor] = []

    def refine(x: Tensor) -> Tensor:
        calls.append(x)
        return detector.bbox_embed(x)

    nn.init.normal_(list(detector.bbox_embed.parameters())[-2])
    decoded = detector.decoder(queries, memory, [refine, refine], None)
    (gradient,) = torch.autograd.grad(decoded.references[1].sum(), calls[0], retain_graph=True)
    assert gradient.abs().sum() > 0
    (gradient,) = torch.autograd.grad(decoded.references[0].sum(), calls[0])
    assert gradient.abs().sum() == 0


def test_activation_checkpointing_changes_no_gradient(
    make_detector: Callable[..., DinoDetector],
) -> None:
    gradients = []
    for enabled in (False, True):
        detector = make_detector(num_feature_levels=3)
        detector.set_activation_checkpointing(enabled)
        predict(detector, feature_maps(1)).logits.sum().backward()
        gradients.append(detector.encoder.level_embed.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
