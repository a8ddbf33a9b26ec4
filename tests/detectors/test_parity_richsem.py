"""Against the official RichSem: language head, federated columns, soft labels of a fixed teacher.

The public code has a column more than there are categories, of the word "none". Its references come
from text embeddings with which that column selects no query and is no noised label; federated
columns are one draw for all calls; and both distributions of the distillation are without it.
"""

import pytest
import torch
from reference import (
    Reference,
    Seen,
    assert_equal,
    load_converted,
    read_reference,
    reference_losses,
    section_of,
    targets_of,
    train,
)
from torch import Tensor

from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.published.richsem import convert
from pipeline.errors import DataError
from pipeline.semantics.branch import SemanticBranch

BATCHES = ["padded", "unpadded"]
NONE = 1
"""Columns of theirs before the first category."""
SCALE = 100.0


def load(reference: Reference) -> DinoDetector:
    section = section_of(reference, {"kind": "language", "scale": SCALE, "bias": False})
    text = reference["text"][NONE:]
    return load_converted(section, convert(reference.under("state/")), len(text), text)


def run(monkeypatch: pytest.MonkeyPatch, name: str, federated: bool) -> tuple[Seen, DinoDetector]:
    reference = read_reference("richsem")
    batch, model = reference.batch(name), load(reference)
    columns = batch["columns"] - NONE if federated else None
    return train(monkeypatch, model, batch, columns, first_label=NONE), model


def semantic_losses(
    seen: Seen, reference: Reference, batch: Reference
) -> tuple[list[Tensor], SemanticBranch]:
    """Of the matched regions and of the denoising ones."""
    text = torch.nn.functional.normalize(reference["text"][NONE:], dim=-1)
    branch = SemanticBranch(reference.options["hidden_dim"], text, temperature=SCALE)
    weight = reference["state/class_embed.clip_visual_proj.weight"]
    branch.load_state_dict({"projection.weight": weight})
    soft = list(batch["teacher_logits"][..., NONE:].softmax(-1))
    targets = targets_of(batch, NONE)
    num_boxes = float(sum(len(target.labels) for target in targets))
    return [branch(m, soft, targets, num_boxes) for m in seen.output.matched], branch


@pytest.mark.parametrize("name", BATCHES)
def test_every_layer_gives_the_public_outputs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Logits are of order 50 here; 1e-4 is absolute nevertheless."""
    batch = read_reference("richsem").batch(name)
    outputs = run(monkeypatch, name, federated=False)[0].outputs
    assert_equal(outputs.encoder.logits[0], batch["interm_logits"][..., NONE:])
    assert_equal(outputs.encoder.boxes[0], batch["interm_boxes"])
    assert_equal(outputs.decoder.logits, batch["logits"][..., NONE:])
    assert_equal(outputs.decoder.boxes, batch["pred_boxes"])
    assert outputs.denoising is not None
    used = batch["dn_logits"].shape[2]
    assert_equal(outputs.denoising.logits[:, :, :used], batch["dn_logits"][..., NONE:])
    assert_equal(outputs.denoising.boxes[:, :, :used], batch["dn_boxes"])


@pytest.mark.parametrize("name", BATCHES)
def test_matches_and_losses_are_the_public_ones(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reference = read_reference("richsem")
    batch = reference.batch(name)
    seen, model = run(monkeypatch, name, federated=True)
    shape = (-1, *batch["boxes"].shape[:2])
    assert torch.equal(seen.matches.query.view(shape), batch["matched_query"])
    assert torch.equal(seen.matches.box.view(shape), batch["matched_box"])
    expected = reference_losses(batch, model.section)
    assert expected.keys() == seen.output.losses.keys()
    for key, value in seen.output.losses.items():
        assert_equal(value, expected[key])


@pytest.mark.parametrize("name", BATCHES)
def test_semantic_losses_are_the_public_ones(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reference = read_reference("richsem")
    batch = reference.batch(name)
    seen, _ = run(monkeypatch, name, federated=True)
    (matched, denoising), _ = semantic_losses(seen, reference, batch)
    assert_equal(matched, batch["loss/loss_distill"])
    assert_equal(denoising, batch["loss/loss_distill_dn"])


def test_gradients_are_the_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = read_reference("richsem")
    batch = reference.batch("padded")
    seen, model = run(monkeypatch, "padded", federated=True)
    semantic, branch = semantic_losses(seen, reference, batch)
    weight = reference.options["distill_loss_coef"]
    terms = [*seen.output.losses.values(), *(weight * loss for loss in semantic)]
    torch.stack(terms).sum().backward()
    names = convert(reference.under("state/")).names
    parameters = {names[name]: p for name, p in model.named_parameters() if name in names}
    parameters["class_embed.clip_visual_proj.weight"] = branch.projection.weight
    expected = batch.under("grad/")
    assert expected.keys() <= parameters.keys()
    for theirs, gradient in expected.items():
        found = parameters[theirs].grad
        assert found is not None
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4)


def test_every_tensor_is_accounted_for() -> None:
    state = read_reference("richsem").under("state/")
    converted = convert(state)
    assert converted.weights.keys() == converted.names.keys()
    assert set(converted.names.values()) | converted.dropped.keys() == state.keys()
    assert not set(converted.names.values()) & converted.dropped.keys()
    kept = {converted.names[f"{head}.weight"] for head in ("class_embed", "encoder_class_embed")}
    assert kept == {
        "class_embed.dino_visual_proj.weight",
        "transformer.enc_out_class_embed.dino_visual_proj.weight",
    }
    assert "copy of CLIP" in converted.dropped["transformer.enc_out_class_embed.clip.logit_scale"]
    assert "class_head.scale" in converted.dropped["class_embed.logit_scale"]
    assert "semantic branch" in converted.dropped["class_embed.clip_visual_proj.weight"]


@pytest.mark.parametrize(
    "name", ["class_embed.0.weight", "class_embed.dino_visual_proj.layers.3.weight"]
)
def test_other_class_heads_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="another class head"):
        convert({name: torch.zeros(3, 3)})
