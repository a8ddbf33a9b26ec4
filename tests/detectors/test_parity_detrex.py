"""Our detector with the weights of detrex's DINO gives its outputs, losses and gradients.

`references/detrex_*` come from detrex (projects/dino, version 0.5) on the CPU, with its PyTorch
path of deformable attention, in float32: 32 channels, 4 heads, 2 encoder and 3 decoder layers, 20
queries, 12 classes, random weights that float16 holds exactly, and feature maps in the place of a
backbone. Its `get_sine_pos_embed` was given 16, half the channels, for its fixed 128. In `plain`
both images fill the batch, in `padded` neither does.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import recipe
from pipeline.data.batch import Targets
from pipeline.detectors.backbone import FeatureMap, resize_mask
from pipeline.detectors.dino import detector as dino
from pipeline.detectors.dino.denoising import DenoisingLayout
from pipeline.detectors.dino.losses import Outputs
from pipeline.detectors.interface import LossContext, Predictions, TrainingOutput
from pipeline.detectors.published.detrex import convert

REFERENCES = Path(__file__).parent / "references"
EXACT = {"atol": 1e-4, "rtol": 0.0}
SECTION = recipe.DetectorSection.model_validate(
    {
        "backbone": {
            "name": "resnet18",
            "weights": None,
            "norm": "own",
            "frozen_stages": 0,
            "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
        },
        "hidden_dim": 32,
        "num_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "ffn_dim": 64,
        "num_queries": 20,
        "shared_heads": False,
        "position_temperature": 10000.0,
        "position_offset": -0.5,
        "class_head": {"kind": "linear"},
        "denoising": {"num_queries": 12},
        "losses": {"federated_categories": 0},
    }
)
LOSSES = {"loss_class": "loss/class", "loss_bbox": "loss/box_l1", "loss_giou": "loss/box_giou"}


class GivenMaps(nn.Module):
    """The reference's feature maps, whatever the image."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor, mask: Tensor) -> list[FeatureMap]:
        return [FeatureMap(x, resize_mask(mask, (x.shape[2], x.shape[3]))) for x in self.maps]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    weights = load_file(REFERENCES / "detrex_weights.safetensors")
    return {name: tensor.float() for name, tensor in weights.items()}


@pytest.fixture(params=["plain", "padded"])
def reference(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return load_file(REFERENCES / f"detrex_{request.param}.safetensors")


@pytest.fixture
def model(state: dict[str, Tensor], reference: dict[str, Tensor]) -> dino.DinoDetector:
    """Ours, with all of its weights from the converted state."""
    model = dino.DinoDetector(SECTION, 12, None)
    model.backbone = GivenMaps([reference[f"maps/res{level}"].float() for level in (3, 4, 5)])
    model.load_state_dict(convert(state).weights, strict=True)
    return model


def images_and_mask(reference: dict[str, Tensor], *, padded: bool = True) -> tuple[Tensor, Tensor]:
    height, width = reference["canvas"].tolist()
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    for image, (h, w) in enumerate(reference["sizes"].tolist()):
        mask[image, h:], mask[image, :, w:] = padded, padded
    return torch.zeros(2, 3, height, width), mask


def targets_of(reference: dict[str, Tensor]) -> list[Targets]:
    return [
        Targets(boxes=boxes, labels=labels, image_id=0, size=(1, 1), original_size=(1, 1))
        for boxes, labels in zip(reference["boxes"], reference["labels"], strict=True)
    ]


def layout_of(reference: dict[str, Tensor]) -> DenoisingLayout:
    """detrex's noise: in each group three positives, then three negatives, of an image's boxes."""
    labels, groups = reference["dn_labels"], int(reference["dn_groups"])
    slot = torch.arange(labels.shape[1])
    positives = (slot % 6 < 3).nonzero()[:, 0]
    return DenoisingLayout(
        group=(slot // 6).expand(2, -1),
        weight=torch.full(labels.shape, 1 / groups),
        labels=labels,
        boxes=reference["dn_boxes"],
        image=torch.arange(2).repeat_interleave(len(positives)),
        query=positives.repeat(2),
        box=(positives % 6).repeat(2),
    )


@pytest.fixture
def trained(
    model: dino.DinoDetector, reference: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[Outputs, dict[str, Tensor]]:
    """Outputs of every layer and losses, after a backward pass through all of them."""
    seen: list[Outputs] = []
    compute = dino.compute_losses

    def record(section, outputs, *rest):  # type: ignore[no-untyped-def]
        seen.append(outputs)
        return compute(section, outputs, *rest)

    monkeypatch.setattr(dino, "compute_losses", record)
    monkeypatch.setattr(dino, "make_denoising", lambda *_, **__: layout_of(reference))
    images, mask = images_and_mask(reference)
    output = model.train()(images, mask, targets_of(reference), LossContext(6.0, None))
    assert isinstance(output, TrainingOutput)
    torch.stack(list(output.losses.values())).sum().backward()
    return seen[0], output.losses


def test_every_layer_gives_the_reference(
    trained: tuple[Outputs, dict[str, Tensor]], reference: dict[str, Tensor]
) -> None:
    outputs, _ = trained
    assert outputs.denoising is not None
    for name, ours in (
        ("enc_logits", outputs.encoder.logits[0]),
        ("enc_boxes", outputs.encoder.boxes[0]),
        ("pred_logits", outputs.decoder.logits),
        ("pred_boxes", outputs.decoder.boxes),
        ("dn_logits", outputs.denoising.logits),
        ("dn_pred_boxes", outputs.denoising.boxes),
    ):
        torch.testing.assert_close(ours.detach(), reference[name], **EXACT, msg=name)


def test_losses_are_the_reference(
    trained: tuple[Outputs, dict[str, Tensor]], reference: dict[str, Tensor]
) -> None:
    theirs = {
        re.sub(r"^losses/(loss_[a-z]+)", lambda found: LOSSES[found[1]], name): value
        for name, value in reference.items()
        if name.startswith("losses/")
    }
    theirs = {name.replace("_enc", "_encoder"): value for name, value in theirs.items()}
    ours = {name: value.detach() for name, value in trained[1].items()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.squeeze(), **EXACT, msg=name)


def test_gradients_are_the_reference(
    trained: tuple[Outputs, dict[str, Tensor]],
    model: dino.DinoDetector,
    state: dict[str, Tensor],
    reference: dict[str, Tensor],
) -> None:
    parameters = dict(model.named_parameters())
    ours = {theirs: parameters[name].grad for name, theirs in convert(state).names.items()}
    compared = [name for name in reference if name.startswith("grads/")]
    assert len(compared) == 6
    for name in compared:
        gradient = ours[name.removeprefix("grads/")]
        assert gradient is not None
        scale = float(reference[name].abs().max())
        torch.testing.assert_close(gradient / scale, reference[name] / scale, **EXACT, msg=name)


def test_inference_gives_the_reference(
    model: dino.DinoDetector, reference: dict[str, Tensor]
) -> None:
    """detrex masks no padding at inference, where it sees one image at a time."""
    with torch.no_grad():
        predicted = model.eval()(*images_and_mask(reference, padded=False))
    assert isinstance(predicted, Predictions)
    torch.testing.assert_close(predicted.logits, reference["eval_logits"], **EXACT)
    torch.testing.assert_close(predicted.boxes, reference["eval_boxes"], **EXACT)


def test_every_tensor_is_accounted_for(state: dict[str, Tensor]) -> None:
    converted = convert(state)
    assert converted.weights.keys() == converted.names.keys()
    assert state.keys() == set(converted.names.values()) | converted.dropped.keys()
    assert set(converted.dropped.values()) == {"a head's second name"}


def test_what_is_not_detrex_is_left_over(state: dict[str, Tensor]) -> None:
    converted = convert(state | {"transformer.surprise.weight": torch.zeros(1)})
    assert "transformer.surprise.weight" not in [*converted.names.values(), *converted.dropped]
