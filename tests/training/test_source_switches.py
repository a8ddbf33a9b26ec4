"""The sources of the paper by name: which terms each of them teaches, and that no other learns.

Samples come from the miniature world through the stream, so the switches are tested from the recipe
to the gradient. The semantic branch reads all layers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from other_forms import name_as_in_lvis
from small_dino import SMALL
from tiny_world import in_line, tiny_recipe
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.miniature.world import draw_world
from pipeline.data.shards.preparing import load_index, prepare_source, shards_url
from pipeline.data.stream.batches import Stream
from pipeline.detectors import build_detector
from pipeline.detectors.interface import LossContext
from pipeline.recipe import DetectorSection, Semantic
from pipeline.semantics.branch import SemanticBranch
from pipeline.training.student import Student

LVIS = {
    "name": "lvis_train",
    "format": "lvis",
    "images": "lvis",
    "annotations": "annotations/lvis_v1_train.json",
}
INET: dict[str, Any] = {
    "name": "imagenet",
    "format": "imagenet21k",
    "images": "imagenet21k",
    "annotations": "imagenet21k/wnid_to_lvis.tsv",
}
O365: dict[str, Any] = {
    "name": "objects365",
    "format": "objects365",
    "images": "objects365",
    "annotations": "objects365/zhiyuan_objv2_train.json",
}
CC: dict[str, Any] = {
    "name": "cc3m",
    "format": "cc3m",
    "images": "cc3m/images",
    "annotations": "cc3m/Train_GCC-training.tsv",
}
NAMED = CC | {
    "name": "cc3m_named",
    "annotations": "cc3m/named.tsv",
    "files": {"classes": LVIS["annotations"]},
}
OFF = {"use_labels": False, "use_class": False, "use_box": False, "use_semantic": False}

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "INet-LVIS": (INET, "class box semantic"),
    "INet-Unl": (INET | {"use_labels": False, "use_box": False}, "semantic"),
    "INet-Unl, coarse boxes": (INET | {"use_labels": False}, "box semantic"),
    "O365": (O365, "class box semantic"),
    "O365-Box": (O365 | {"use_labels": False}, "box semantic"),
    "CC3M": (NAMED, "class box semantic"),
    "CC-Unl": (CC | {"use_box": False}, "semantic"),
    "classes alone": (O365 | {"use_box": False, "use_semantic": False}, "class"),
    "boxes alone": (O365 | {"use_class": False, "use_semantic": False}, "box"),
    "no classes": (O365 | {"use_class": False}, "box semantic"),
    "no semantics": (INET | {"use_semantic": False}, "class box"),
}
"""A source, and the terms that it teaches."""
LAYERS = ("", "_0", "_encoder", "_dn", "_dn_0")
KEYS = {f"loss/{term}{layer}" for term in ("class", "box_l1", "box_giou") for layer in LAYERS} | {
    f"loss/semantic{layer}" for layer in ("", "_dn", "_0", "_dn_0")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw world and the shards of every source."""
    path = tmp_path_factory.mktemp("sources")
    recipe = tiny_recipe(path, "any", data={"extra": [INET, O365, CC, NAMED]})
    draw_world(recipe.data.root, "tiny", 0)
    name_as_in_lvis(Path(recipe.data.root))
    name_in_captions(Path(recipe.data.root))
    for source in recipe.data.sources:
        prepare_source(source, recipe.data, in_line)
    return path


def name_in_captions(root: Path) -> None:
    """Captions of the same photographs that each name a category: few of so small a world do, and
    a mosaic teaches classes only where all four do."""
    categories = json.loads((root / str(LVIS["annotations"])).read_text())["categories"]
    lines = (root / CC["annotations"]).read_text().splitlines()
    named = [
        f"a photo of a {categories[i % len(categories)]['name'].replace('_', ' ')}\t{url}"
        for i, (_, url) in enumerate(line.split("\t") for line in lines)
    ]
    (root / NAMED["annotations"]).write_text("\n".join(named) + "\n")


def extra_batch(folder: Path, source: dict[str, Any]) -> tuple[Batch, int]:
    """The images of the first step of extra data, and the number of categories."""
    recipe = tiny_recipe(folder, "any", data={"extra": [source]})
    data = recipe.data
    indexes = {s.name: load_index(shards_url(data, s)) for s in data.sources}
    vocabulary = indexes["lvis_train"].vocabulary
    stream = Stream(data, recipe.training, indexes, vocabulary, seed=0)
    steps: Iterator[Any] = stream.iterate(1, 8)
    for step in steps:
        if step.stream == "extra" and any(len(t.labels) for t in step.micro_batches[0].targets):
            return step.micro_batches[0], vocabulary.num_categories
    raise AssertionError("no step of extra data has a box")


def small_student(categories: int, **semantic: Any) -> Student:
    torch.manual_seed(0)
    text = F.normalize(torch.randn(categories, 16), dim=-1)
    section = DetectorSection.model_validate(SMALL)
    detector = build_detector(section, num_categories=categories, text_embeddings=text)
    branch_section = Semantic(**semantic)
    branch = SemanticBranch(detector.feature_dim, text, 20.0, branch_section)
    return Student(detector, branch, branch_section)


def soft_labels_of(batch: Batch, categories: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(len(target.labels), categories, generator=generator).softmax(-1)
        for target in batch.targets
    ]


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("case", CASES)
def test_a_source_teaches_its_terms_and_no_other(folder: Path, case: str) -> None:
    source, taught = CASES[case]
    batch, categories = extra_batch(folder, source)
    student = small_student(categories, layers="all")
    columns = torch.cat([target.labels for target in batch.targets])
    columns = torch.cat([columns[columns >= 0], torch.arange(5)]).unique()
    context = LossContext(float(sum(len(t.labels) for t in batch.targets)), columns)
    soft = soft_labels_of(batch, categories)
    losses = student(batch.images, batch.mask, batch.targets, context, soft)
    assert losses.keys() == KEYS
    for key, loss in losses.items():
        term = key.removeprefix("loss/").split("_")[0]
        found = gradients(loss, student)
        if term in taught.split():
            assert float(loss.detach()) > 0, key
            assert any(g is not None and g.any() for g in found), key
        else:
            assert float(loss.detach()) == 0, key
            assert not any(g is not None and g.any() for g in found), key
    torch.stack(list(losses.values())).sum().backward()
    missing = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("case", ["INet-LVIS", "O365", "CC3M"])
def test_hard_labels_teach_named_boxes_without_a_teacher(folder: Path, case: str) -> None:
    batch, categories = extra_batch(folder, CASES[case][0])
    student = small_student(categories, labels="hard")
    losses = student(batch.images, batch.mask, batch.targets, LossContext(4.0, None))
    assert float(losses["loss/semantic"].detach()) > 0
    blind, _ = extra_batch(folder, CASES[case][0] | {"use_labels": False})
    losses = student(blind.images, blind.mask, blind.targets, LossContext(4.0, None))
    assert (
        float(losses["loss/semantic"].detach()) == float(losses["loss/semantic_dn"].detach()) == 0
    )


def test_labels_of_whole_images_are_not_exhaustive(folder: Path) -> None:
    for case in ("INet-LVIS", "CC3M", "O365"):
        source = CASES[case][0]
        for negatives, sampled in ({}, False), ({"federated_negatives": "sampled"}, True):
            batch, _ = extra_batch(folder, source | negatives)
            assert {target.sampled_negatives for target in batch.targets} == {sampled}
            if case != "O365" or sampled:
                assert not any(target.negative_categories for target in batch.targets)


def test_boxes_of_other_categories_tell_of_those_that_they_can_name(folder: Path) -> None:
    """Objects365 has six of the twelve here: whether the others are there, nobody has looked."""
    batch, categories = extra_batch(folder, O365)
    recipe = tiny_recipe(folder, "any", data={"extra": [O365]})
    index = load_index(shards_url(recipe.data, recipe.data.extra[0]))
    lvis = load_index(shards_url(recipe.data, recipe.data.train[0])).vocabulary
    mapped = {int(column) for column in lvis.columns_from(index.vocabulary) if column >= 0}
    assert 0 < len(mapped) < categories
    for target in batch.targets:
        assert set(target.negative_categories) == mapped - set(target.labels.tolist())


def test_the_branch_learns_where_it_should(folder: Path) -> None:
    batch, categories = extra_batch(folder, INET)
    student = small_student(categories, layers="all")
    soft = soft_labels_of(batch, categories)
    context = LossContext(4.0, None)
    losses = student(batch.images, batch.mask, batch.targets, context, soft)
    detector = student.detector
    assert student.branch is not None
    layers = detector.decoder.layers  # type: ignore[union-attr]
    reached = {
        "loss/semantic": [student.branch, *layers, detector.encoder, detector.backbone],
        "loss/semantic_dn": [student.branch, *layers, detector.encoder, detector.label_embed],
        "loss/semantic_0": [student.branch, layers[0], detector.encoder, detector.backbone],
    }
    heads = [detector.class_embed, detector.encoder_class_embed, detector.encoder_bbox_embed]
    untouched = {key: heads for key in reached} | {"loss/semantic_0": [*heads, layers[1]]}
    for key, parts in reached.items():
        for part in parts:
            found = gradients(losses[key], part)  # type: ignore[arg-type]
            assert any(g is not None and g.any() for g in found), key
        for part in untouched[key]:
            found = gradients(losses[key], part)  # type: ignore[arg-type]
            assert not any(g is not None and g.any() for g in found), key


@pytest.mark.slow
def test_a_few_steps_bring_the_branch_to_its_labels(folder: Path) -> None:
    """Each objective falls; what was learned is the soft label of each box."""
    batch, categories = extra_batch(folder, INET)
    soft = soft_labels_of(batch, categories)
    embeddings = [F.normalize(torch.randn(len(part), 16), dim=-1) for part in soft]
    columns = torch.arange(categories)
    for changes, taught in (
        ({}, soft),
        ({"columns": "federated", "entropy_weighting": True}, soft),
        ({"labels": "hard"}, None),
        ({"objective": "features"}, embeddings),
    ):
        student = small_student(categories, **changes)
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        values = []
        for _ in range(25):
            losses = student(
                batch.images, batch.mask, batch.targets, LossContext(4.0, columns), taught
            )
            loss = losses["loss/semantic"] + losses["loss/semantic_dn"]
            values.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert values[-1] < 0.6 * values[0], (changes, values[0], values[-1])
