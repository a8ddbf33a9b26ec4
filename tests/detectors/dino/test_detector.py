from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_dino import SMALL
from torch import Tensor

from pipeline.data.batch import Targets
from pipeline.detectors.boxes import cxcywh_to_xyxy, generalized_iou
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.interface import LossContext, Predictions, TrainingOutput
from pipeline.errors import RecipeError
from pipeline.semantics.branch import SemanticBranch

MakeDetector = Callable[..., DinoDetector]
MakeTargets = Callable[..., list[Targets]]
Images = tuple[Tensor, Tensor]
ALL = LossContext(7.0, None)


def unlabelled(target: Targets) -> Targets:
    return replace(target, labels=torch.full_like(target.labels, -1), class_weight=0.0)


CASES: dict[str, Callable[[MakeTargets], list[Targets]]] = {
    "usual": lambda make: make([3, 1, 2, 5]),
    "one image without boxes": lambda make: make([3, 0, 2, 0]),
    "no boxes at all": lambda make: make([0, 0, 0, 0]),
    "unlabelled": lambda make: [unlabelled(target) for target in make([2, 2, 1, 0])],
    "coarse": lambda make: make([1, 1, 1, 1], coarse=True, box_weight=0.0),
    "padding samples": lambda make: make(
        [2, 0, 1, 0], class_weight=0.0, box_weight=0.0, semantic_weight=0.0
    ),
    "more boxes than queries": lambda make: make([40, 0, 1, 0]),
}


def train(
    detector: DinoDetector, images: Images, targets: list[Targets], context: LossContext = ALL
) -> TrainingOutput:
    output = detector(*images, targets, context)
    assert isinstance(output, TrainingOutput)
    return output


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"denoising": {"num_queries": 0}},
        {"class_head": {"kind": "linear"}},
        {"class_head": {"kind": "language", "bias": False}},
    ],
    ids=["language", "without denoising", "linear", "without bias"],
)
def test_every_parameter_takes_part(
    make_detector: MakeDetector,
    make_targets: MakeTargets,
    images: Images,
    case: str,
    changes: dict[str, dict[str, object]],
) -> None:
    detector, targets = make_detector(**changes), CASES[case](make_targets)
    branch = SemanticBranch(32, torch.eye(12, 16), temperature=10.0)
    output = train(detector, images, targets, LossContext(7.0, torch.arange(12)))
    soft = [torch.full((len(target.labels), 12), 1 / 12) for target in targets]
    semantic = [branch(matched, soft, targets, 7.0) for matched in output.matched]
    total = torch.stack([*output.losses.values(), *semantic]).sum()
    total.backward()
    assert total.isfinite()
    for name, parameter in [*detector.named_parameters(), *branch.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_loss_keys_do_not_depend_on_the_batch(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images
) -> None:
    detector = make_detector()
    suffixes = ["", "_0", "_encoder", "_dn", "_dn_0"]
    terms = ["class", "box_l1", "box_giou"]
    for case in CASES.values():
        losses = train(detector, images, case(make_targets)).losses
        assert losses.keys() == {f"loss/{term}{suffix}" for term in terms for suffix in suffixes}


def test_image_weights_reach_every_term(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images
) -> None:
    detector = make_detector()
    base = train(detector, images, make_targets([3, 1, 2, 5])).losses
    halved = make_targets([3, 1, 2, 5], class_weight=0.5, box_weight=0.0)
    for key, value in train(detector, images, halved).losses.items():
        expected = 0.5 * base[key] if "class" in key else torch.zeros(())
        torch.testing.assert_close(value, expected)


def test_losses_add_up_over_micro_batches(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images
) -> None:
    detector = make_detector()
    targets = make_targets([3, 0, 8, 2])
    together = train(detector, images, targets)
    parts = [slice(0, 1), slice(1, 4)]
    split = [train(detector, (images[0][p], images[1][p]), targets[p]) for p in parts]
    for key, value in together.losses.items():
        torch.testing.assert_close(
            sum(part.losses[key] for part in split), value, rtol=1e-4, atol=1e-5
        )
    branch = SemanticBranch(32, torch.eye(12, 16), temperature=10.0)
    soft = [torch.eye(12)[target.labels] for target in targets]
    for k in range(2):
        whole = branch(together.matched[k], soft, targets, 7.0)
        sums = [
            branch(part.matched[k], soft[p], targets[p], 7.0)
            for part, p in zip(split, parts, strict=True)
        ]
        torch.testing.assert_close(sum(sums), whole, rtol=1e-4, atol=1e-5)


def test_denoising_does_not_leak_into_matching(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images
) -> None:
    targets = make_targets([3, 1, 2, 5])
    with_denoising = make_detector()
    without = make_detector(denoising={"num_queries": 0})
    missing, unexpected = without.load_state_dict(with_denoising.state_dict(), strict=False)
    assert not missing and unexpected == ["label_embed.weight"]
    a, b = train(with_denoising, images, targets), train(without, images, targets)
    for key, value in b.losses.items():
        torch.testing.assert_close(a.losses[key], value)
    torch.testing.assert_close(a.matched[0].features, b.matched[0].features)


def test_matched_regions_name_each_box_once(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images
) -> None:
    matched, denoised = train(make_detector(), images, make_targets([3, 0, 2, 9])).matched
    pairs = sorted(zip(matched.image.tolist(), matched.box.tolist(), strict=True))
    counts = {0: 3, 2: 2, 3: 9}
    assert pairs == [(image, box) for image, n in counts.items() for box in range(n)]
    assert matched.features.shape == (14, 32) and (matched.copies == 1).all()
    share = torch.zeros(4).index_add_(0, denoised.image, denoised.copies.reciprocal())
    torch.testing.assert_close(share, torch.tensor([3.0, 0.0, 2.0, 9.0]))


def test_five_scales_take_the_finest_map_too(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images
) -> None:
    backbone = SMALL["backbone"] | {"out_indices": [1, 2, 3, 4]}
    detector = make_detector(backbone=backbone, num_feature_levels=5)
    sizes = [tuple(level.features.shape[2:]) for level in detector._feature_maps(*images)]
    assert sizes == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    losses = train(detector, images, make_targets([3, 1, 2, 5])).losses
    torch.stack(list(losses.values())).sum().backward()
    finest = detector.input_proj[0][0].weight.grad
    assert finest is not None and finest.abs().sum() > 0


def test_prediction_needs_no_targets(make_detector: MakeDetector, images: Images) -> None:
    detector = make_detector().eval()
    output = detector(*images)
    assert isinstance(output, Predictions)
    assert output.logits.shape == (4, 15, 12) and output.boxes.shape == (4, 15, 4)
    assert output.boxes.min() >= 0 and output.boxes.max() <= 1


def test_fewer_cells_than_queries_give_fewer_queries(
    make_detector: MakeDetector, make_targets: MakeTargets
) -> None:
    detector = make_detector(num_queries=200)
    images = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    assert detector(*images).logits.shape == (1, 64 + 16 + 4 + 1, 12)
    train(detector, images, make_targets([2]))


def test_category_parameters_are_those_with_a_row_for_each(make_detector: MakeDetector) -> None:
    for kind in ("language", "linear"):
        detector = make_detector(class_head={"kind": kind})
        state = detector.state_dict()
        rows = {name for name, tensor in state.items() if tensor.dim() and len(tensor) == 12}
        assert set(detector.category_parameters()) == rows


def test_language_head_needs_fitting_text(make_section: Callable[..., object]) -> None:
    from pipeline.detectors import build_detector

    section = make_section()
    with pytest.raises(RecipeError, match="needs text embeddings"):
        build_detector(section, num_categories=12, text_embeddings=None)
    with pytest.raises(RecipeError, match="do not fit 12 categories"):
        build_detector(section, num_categories=12, text_embeddings=torch.eye(11, 16))


def test_autocast_keeps_losses_in_float32(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images
) -> None:
    detector, targets = make_detector(), make_targets([3, 1, 2, 0])
    exact = train(detector, images, targets).losses
    with torch.autocast("cpu", torch.bfloat16):
        output = train(detector, images, targets)
    torch.stack(list(output.losses.values())).sum().backward()
    for key, value in output.losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[key], rtol=0.25, atol=0.05)


def test_two_images_are_memorised(make_detector: MakeDetector) -> None:
    """Coloured rectangles on grey: classes and boxes must be found within ninety steps."""
    corners = [[(8, 8, 40, 32), (30, 40, 60, 60)], [(10, 20, 50, 56)]]
    images = torch.zeros(2, 3, 64, 64)
    targets = []
    for i, boxes in enumerate(corners):
        for channel, (x0, y0, x1, y1) in enumerate(boxes):
            images[i, (channel + i) % 3, y0:y1, x0:x1] = 3.0
        xyxy = torch.tensor(boxes) / 64
        cxcywh = torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], dim=1)
        labels = torch.arange(len(boxes)) + 2 * i
        targets.append(Targets(cxcywh, labels, i, (64, 64), (64, 64)))
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    detector = make_detector(class_head={"kind": "language", "scale": 20.0})
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    for step in range(90):
        seeded = [replace(target, seed=step * 2 + i) for i, target in enumerate(targets)]
        losses = train(detector, (images, mask), seeded, LossContext(3.0, None)).losses
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        logits, boxes = detector.eval()(images, mask)
    for i, target in enumerate(targets):
        best = logits[i].amax(-1).topk(len(target.labels)).indices
        iou = generalized_iou(
            cxcywh_to_xyxy(boxes[i, best])[:, None], cxcywh_to_xyxy(target.boxes)[None]
        )
        found = logits[i, best].argmax(-1)
        assert sorted(found.tolist()) == target.labels.tolist()
        assert iou.amax(0).min() > 0.75
