"""Against the official DINO: outputs and losses of the same weights, inputs and noise."""

import pytest
import torch
from reference import (
    Reference,
    assert_equal,
    images_of,
    load_converted,
    read_reference,
    reference_losses,
    section_of,
    train,
)

from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.interface import Predictions
from pipeline.detectors.published.dino import convert
from pipeline.errors import DataError

FILES = ["dino_4scale", "dino_5scale"]
BATCHES = ["padded", "unpadded"]


def load(reference: Reference) -> DinoDetector:
    section = section_of(reference, {"kind": "linear"})
    converted = convert(reference.under("state/"))
    return load_converted(section, converted, reference.options["num_classes"], None)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", BATCHES)
def test_every_layer_gives_the_public_outputs(
    monkeypatch: pytest.MonkeyPatch, file: str, name: str
) -> None:
    reference = read_reference(file)
    batch = reference.batch(name)
    outputs = train(monkeypatch, load(reference), batch).outputs
    assert_equal(outputs.encoder.logits[0], batch["interm_logits"])
    assert_equal(outputs.encoder.boxes[0], batch["interm_boxes"])
    # With padding, some selected cells have no usable anchor: theirs is the corner box.
    assert bool((batch["interm_boxes"] > 0.9999).all(-1).any()) == (name == "padded")
    assert_equal(outputs.decoder.logits, batch["logits"])
    assert_equal(outputs.decoder.boxes, batch["pred_boxes"])
    assert outputs.denoising is not None
    used = batch["dn_logits"].shape[2]
    assert_equal(outputs.denoising.logits[:, :, :used], batch["dn_logits"])
    assert_equal(outputs.denoising.boxes[:, :, :used], batch["dn_boxes"])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", BATCHES)
def test_matches_and_losses_are_the_public_ones(
    monkeypatch: pytest.MonkeyPatch, file: str, name: str
) -> None:
    """With equal numbers of boxes, groups of each image are those of the batch."""
    reference = read_reference(file)
    batch, model = reference.batch(name), load(reference)
    seen = train(monkeypatch, model, batch)
    images, boxes = batch["boxes"].shape[:2]
    shape = (-1, images, boxes)
    assert torch.equal(seen.matches.query.view(shape), batch["matched_query"])
    assert torch.equal(seen.matches.box.view(shape), batch["matched_box"])
    expected = reference_losses(batch, model.section)
    assert expected.keys() == seen.output.losses.keys()
    for key, value in seen.output.losses.items():
        assert_equal(value, expected[key])


@pytest.mark.parametrize("file", FILES)
def test_gradients_are_the_public_ones(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    reference = read_reference(file)
    batch, model = reference.batch("padded"), load(reference)
    converted = convert(reference.under("state/"))
    ours = {theirs: name for name, theirs in converted.names.items()}
    losses = train(monkeypatch, model, batch).output.losses
    torch.stack(list(losses.values())).sum().backward()
    parameters = dict(model.named_parameters())
    for theirs, expected in batch.under("grad/").items():
        gradient = parameters[ours[theirs]].grad
        assert gradient is not None
        assert_equal(gradient, expected[: len(gradient)])


@pytest.mark.parametrize("file", FILES)
def test_inference_gives_the_last_layer(file: str) -> None:
    reference = read_reference(file)
    batch, model = reference.batch("padded"), load(reference)
    model.backbone.maps = list(batch.under("maps/").values())
    with torch.no_grad():
        output = model.eval()(*images_of(batch))
    assert isinstance(output, Predictions)
    assert_equal(output.logits, batch["logits"][-1])
    assert_equal(output.boxes, batch["pred_boxes"][-1])


def test_every_tensor_is_accounted_for() -> None:
    state = read_reference("dino_4scale").under("state/")
    converted = convert(state)
    assert converted.weights.keys() == converted.names.keys()
    rows = {"label_enc.weight[12:]": "rows after the last class, which no label means"}
    assert rows.items() <= converted.dropped.items()
    assert set(converted.names.values()) | (converted.dropped.keys() - rows) == state.keys()
    same = converted.dropped["transformer.decoder.class_embed.2.weight"]
    assert same == "the same tensor as class_embed.0.weight"
    unknown = convert(state | {"refpoint_embed.weight": torch.zeros(1)})
    assert unknown.names == converted.names and unknown.dropped == converted.dropped


def test_heads_that_are_not_shared_are_refused() -> None:
    state = read_reference("dino_4scale").under("state/")
    state["bbox_embed.1.layers.2.bias"] = state["bbox_embed.1.layers.2.bias"] + 1
    with pytest.raises(DataError, match=r"bbox_embed\.0.* and bbox_embed\.1.* differ"):
        convert(state)


def test_too_few_label_rows_are_refused() -> None:
    state = read_reference("dino_4scale").under("state/")
    state["label_enc.weight"] = state["label_enc.weight"][:5]
    with pytest.raises(DataError, match="5 rows for 12 classes"):
        convert(state)
