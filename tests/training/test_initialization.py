"""What a run takes from another's weights, and what begins anew."""

from pathlib import Path

import pytest
import torch
from small_dino import NUM_CATEGORIES as DINO_CATEGORIES
from small_dino import SMALL
from test_checkpoint import make_recipe, save_steps, toy_state, vocabulary
from torch import Tensor, nn
from toy_student import NUM_CATEGORIES, ToyDetector

from pipeline.detectors import build_detector
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.errors import RecipeError
from pipeline.recipe import DetectorSection
from pipeline.training.checkpoint import (
    Progress,
    State,
    find_source,
    initialize,
    load_weights,
    save,
)


def test_initialization_maps_rows_of_shared_categories(tmp_path: Path) -> None:
    [directory] = save_steps(tmp_path, 5)
    ours = vocabulary(["ring", "sun", "cat", "dog"])
    torch.manual_seed(5)
    detector = ToyDetector(4)
    fresh = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    report = initialize(detector, directory, ours)
    source = load_weights(directory, ema=True)
    weight = detector.class_embed.weight
    assert torch.equal(weight[0], source["class_embed.weight"][6])
    assert torch.equal(weight[1], fresh["class_embed.weight"][1])
    assert torch.equal(weight[2:], source["class_embed.weight"][:2])
    assert torch.equal(detector.box_embed.weight, source["box_embed.weight"])
    assert torch.equal(detector.text_embeddings, fresh["text_embeddings"])
    assert (report.matched_categories, report.num_categories) == (3, 4)
    assert report.mapped == ["class_embed.weight", "class_embed.bias"]
    assert report.fresh == ["text_embeddings"]
    assert "3 of 4 categories" in str(report)


def test_a_class_head_of_another_kind_begins_anew(tmp_path: Path) -> None:
    """One has text and the other has not: what has the same name means something else."""
    [directory] = save_steps(tmp_path, 5)
    linear = ToyDetector(4)
    del linear.text_embeddings
    linear.class_embed = nn.Linear(3, 4)
    fresh = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    report = initialize(linear, directory, vocabulary(["ring", "sun", "cat", "dog"]))
    for name in ("class_embed.weight", "class_embed.bias"):
        assert torch.equal(linear.state_dict()[name], fresh[name])
    assert report.fresh == ["class_embed.weight", "class_embed.bias"] and not report.mapped
    source = load_weights(directory, ema=True)
    assert torch.equal(linear.box_embed.weight, source["box_embed.weight"])


def test_a_language_head_begins_anew_where_a_linear_one_was(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, detector={"class_head": {"kind": "linear"}}, semantic=None)
    learnt = toy_state().weights
    weights = {name: t for name, t in learnt.items() if not name.endswith("text_embeddings")}
    state, progress = State(weights, {}, {}, updates=0), Progress(5, 0, {"seed": 0})
    directory = save(state, progress, recipe, vocabulary(), 1)
    detector = ToyDetector(NUM_CATEGORIES)
    fresh = detector.class_embed.weight.detach().clone()
    report = initialize(detector, directory, vocabulary())
    assert report.another_head and torch.equal(detector.class_embed.weight, fresh)
    assert torch.equal(detector.box_embed.weight, learnt["detector.box_embed.weight"])


def _other_text(kind: str) -> Tensor:
    """For 4 categories, where the toy's own are rows of three ones."""
    texts = {
        "other prompts": torch.tensor([1.0, 0.9, 0.6]),
        "another tower": torch.tensor([1.0, -2.0, 1.1]),
        "another width": torch.ones(5),
    }
    return texts[kind].expand(4, -1).clone()


@pytest.mark.parametrize("kind", ["other prompts", "another tower", "another width"])
def test_a_class_head_of_another_text_begins_anew(tmp_path: Path, kind: str) -> None:
    """The same names elsewhere in the text's space are another tower's; a little aside are not."""
    [directory] = save_steps(tmp_path, 5)
    detector = ToyDetector(4)
    detector.text_embeddings = _other_text(kind)
    fresh = detector.class_embed.weight.detach().clone()
    report = initialize(detector, directory, vocabulary(["ring", "sun", "cat", "dog"]))
    anew = kind != "other prompts"
    assert torch.equal(detector.class_embed.weight, fresh) == anew == report.another_head
    assert ("begin anew" in str(report)) == anew
    source = load_weights(directory, ema=True)
    assert torch.equal(detector.box_embed.weight, source["box_embed.weight"])


@pytest.mark.parametrize("text", ["the same", "another tower's"])
def test_all_class_heads_of_dino_begin_anew_with_another_text(tmp_path: Path, text: str) -> None:
    """Those of the decoder and the encoder, and the projection of denoising labels."""
    generator = torch.Generator().manual_seed(3)
    there, elsewhere = (torch.randn(DINO_CATEGORIES, 16, generator=generator) for _ in range(2))
    section = DetectorSection.model_validate(SMALL)

    def detector(rows: Tensor) -> DinoDetector:
        return build_detector(section, num_categories=DINO_CATEGORIES, text_embeddings=rows)

    names = vocabulary([f"thing {number}" for number in range(DINO_CATEGORIES)])
    source = detector(there)
    weights = {f"detector.{name}": tensor for name, tensor in source.state_dict().items()}
    state = State(weights, {}, {}, updates=0)
    directory = save(state, Progress(5, 0, {"seed": 0}), make_recipe(tmp_path), names, 1)
    anew = text != "the same"
    target = detector(elsewhere if anew else there)
    report = initialize(target, directory, names)
    of_heads = {
        name for name, _ in target.named_parameters() if name.split(".")[0] in target.class_heads
    }
    assert {name.split(".")[0] for name in of_heads} == set(DinoDetector.class_heads)
    assert set(report.fresh) - {"text_embeddings"} == (of_heads if anew else set())
    bodies = [d.decoder.state_dict() for d in (source, target)]
    assert all(torch.equal(bodies[0][name], bodies[1][name]) for name in bodies[0])


@pytest.mark.parametrize("width", [16, 24])
def test_an_imported_language_head_without_text_is_taken(tmp_path: Path, width: int) -> None:
    """As RichSem's public weights are, imported without annotations: text is no weight there. Of a
    tower whose text has another width it begins anew."""
    section = DetectorSection.model_validate(SMALL)
    rows = torch.randn(DINO_CATEGORIES, 24, generator=torch.Generator().manual_seed(3))
    source, target = (
        build_detector(section, num_categories=DINO_CATEGORIES, text_embeddings=rows[:, :side])
        for side in (16, width)
    )
    learnt = source.state_dict()
    weights = {f"detector.{name}": t for name, t in learnt.items() if name != "text_embeddings"}
    recipe = make_recipe(tmp_path)
    assert recipe.detector.class_head.kind == "language"
    progress, state = Progress(5, 0, {"seed": 0}), State(weights, {}, {}, updates=0)
    directory = save(state, progress, recipe, vocabulary([]), 1)
    names = vocabulary([f"thing {number}" for number in range(DINO_CATEGORIES)])
    report = initialize(target, directory, names)
    taken = {name for name in learnt if name not in report.fresh}
    assert all(torch.equal(target.state_dict()[name], learnt[name]) for name in taken)
    assert report.another_head == (width != 16)
    heads = {name.split(".")[0] for name in report.fresh}
    assert heads == {"text_embeddings", *(target.class_heads if report.another_head else ())}


def test_initialization_refuses_another_detector(tmp_path: Path) -> None:
    [directory] = save_steps(tmp_path, 5)
    detector = ToyDetector(NUM_CATEGORIES)
    detector.box_embed = nn.Linear(5, 3)
    with pytest.raises(
        RecipeError, match=r"box_embed.weight has shape \(4, 5\) there and \(3, 5\)"
    ):
        initialize(detector, directory, vocabulary())


@pytest.mark.parametrize("shape", [(9, 5), (NUM_CATEGORIES, 6)])
def test_rows_of_a_class_head_of_another_kind_are_no_categories(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    """A language head has a weight of the same name, with a row for each of the text's numbers."""
    weights = toy_state().weights | {"detector.class_embed.weight": torch.ones(shape)}
    state = State(weights, {}, {}, updates=0)
    directory = save(state, Progress(5, 0, {"seed": 0}), make_recipe(tmp_path), vocabulary(), 1)
    with pytest.raises(RecipeError, match=r"class_embed.weight has shape"):
        initialize(ToyDetector(4), directory, vocabulary(["ring", "sun", "cat", "dog"]))


def test_initialize_from_finds_a_run_by_name_and_by_path(tmp_path: Path) -> None:
    _, newest = save_steps(tmp_path, 5, 6)
    beside = make_recipe(tmp_path, name="fine", initialize_from="run")
    assert find_source(beside) == newest
    for path in (newest.parent.parent, newest):
        elsewhere = make_recipe(tmp_path / "other", name="fine", initialize_from=str(path))
        assert find_source(elsewhere) == newest
    with pytest.raises(RecipeError, match=r"initialize_from 'nowhere': no checkpoint"):
        find_source(make_recipe(tmp_path, name="fine", initialize_from="nowhere"))
