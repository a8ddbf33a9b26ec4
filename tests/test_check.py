"""What `longtail check` refuses before anything is spent: resources and packages."""

import json
import re
from pathlib import Path
from threading import Event

import pytest
import torch
from tiny_world import in_line, tiny_recipe

from pipeline import run
from pipeline.check import check_stages, sources_of
from pipeline.data import sources
from pipeline.data.miniature.world import draw_world
from pipeline.data.shards.preparing import prepare_source
from pipeline.errors import RecipeError
from pipeline.preparation import prepare_sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check")
    draw_world(path / "raw", "tiny", 0)
    return path


def test_a_good_recipe_is_described(folder: Path) -> None:
    text = check_stages([tiny_recipe(folder, "tiny")])
    assert "tiny" in text
    assert "at most     2 x 96x96 pixels a micro-batch; 300 boxes and 12 + 8 queries" in text
    assert "MB for the distributions of the semantic branch" in text
    # Two rows of 12 categories, at 2 layers of 2 images, for each of 400 matched queries, as many
    # as there may be boxes, and of 1600 denoised ones.
    many = {"num_queries": 5000, "denoising": {"num_queries": 3200}}
    detector = tiny_recipe(folder, "tiny").detector.model_dump() | many
    data = {"max_boxes": 400}
    wide = tiny_recipe(folder, "wide", detector=detector, data=data, semantic={"layers": "all"})
    assert "0.8 MB for the distributions of the semantic branch" in check_stages([wide])
    plain = tiny_recipe(folder, "plain", semantic=None)
    assert "semantic branch" not in check_stages([plain])
    assert re.search(r"backbone +resnet\w+, \d+\.\d M parameters: \d\.\d\d GB of weights", text)
    crowded = tiny_recipe(folder, "tiny", data={"max_boxes": 500}, training={"micro_batch": 1})
    assert "1 x 96x96 pixels a micro-batch; 500 boxes" in check_stages([crowded])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"cpus": 4096}}, "evaluation.cpus is 4096, and the trainers leave"),
        ({"evaluation": {"gpus": 64}}, "evaluation.gpus 64 and the trainers' GPUs are 64"),
        ({"logging": {"wandb": "tail"}}, "logging.wandb is set, and wandb is not installed"),
        ({"logging": {"trackio": "tail"}}, "logging.trackio is set, and trackio is not installed"),
    ],
)
def test_what_is_not_there_is_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, dict[str, object]],
    message: str,
) -> None:
    monkeypatch.setattr("pipeline.check.machine.find_spec", lambda package: None)
    with pytest.raises(RecipeError, match=message):
        check_stages([tiny_recipe(folder, "tiny", **changes)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpus_that_are_not_there_are_refused(folder: Path) -> None:
    recipe = tiny_recipe(folder, "tiny", cluster={"gpus_per_worker": 1})
    with pytest.raises(RecipeError, match="no GPU that torch can use"):
        check_stages([recipe])


def test_a_validation_source_that_was_stored_smaller_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    validation = {
        "name": "lvis_val",
        "format": "lvis",
        "images": "lvis",
        "annotations": "annotations/lvis_v1_val.json",
    }
    data = {"validation": validation, "shards": str(tmp_path)}
    recipe = tiny_recipe(folder, "tiny", data=data)
    assert recipe.data.validation is not None
    prepare_source(recipe.data.validation, recipe.data, in_line, short_side=40)
    with pytest.raises(RecipeError, match="lvis_val were stored smaller, and AP is in pixels"):
        check_stages([recipe])
    prepare_source(recipe.data.validation, recipe.data, in_line)
    check_stages([recipe])


def test_another_vocabulary_than_the_detectors_is_refused_as_soon_as_it_is_known(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any training: categories of raw data are read when they are prepared."""
    objects = "objects365/zhiyuan_objv2_train.json"
    validation = {
        "name": "objects365",
        "format": "objects365",
        "images": "objects365",
        "annotations": objects,
    }
    data = {"validation": validation, "extra": [], "shards": str(tmp_path)}
    recipe = tiny_recipe(folder, "tiny", data=data, semantic=None)
    monkeypatch.setattr("pipeline.preparation._tasks", lambda *_: in_line)
    check_stages([recipe])
    with pytest.raises(RecipeError, match="objects365 has another vocabulary than the detector"):
        prepare_sources(recipe, Event())
    with pytest.raises(RecipeError, match="objects365 has another vocabulary than the detector"):
        check_stages([recipe])


def test_a_stage_may_train_differently_what_it_starts_from(folder: Path) -> None:
    """Only what the weights depend on has to be the same."""
    first = tiny_recipe(folder, "first")
    backbone = first.detector.backbone.model_dump() | {"frozen_stages": 1, "layer_decay": 0.9}
    free = {"backbone": backbone, "kernel": "portable", "denoising": {"num_queries": 4}}
    check_stages([first, tiny_recipe(folder, "fine", initialize_from="first", detector=free)])
    for detector, message in (
        ({"decoder_layers": 3}, r"detector\.decoder_layers is another: \d there, 3 here"),
        ({"backbone": backbone | {"name": "resnet14t"}}, r"detector\.backbone\.name is another"),
    ):
        second = tiny_recipe(folder, "fine", initialize_from="first", detector=detector)
        with pytest.raises(RecipeError, match=message):
            check_stages([first, second])


def test_it_says_which_class_heads_begin_anew_and_refuses_none(folder: Path) -> None:
    """As a run does that starts from one with another kind of head, or another tower's text."""
    first, linear = tiny_recipe(folder, "first"), {"class_head": {"kind": "linear"}}
    for changes, message in (
        ({"detector": linear, "semantic": None}, "they are language there and linear here"),
        ({"teacher": {"model": "RN50"}}, "text is of miniature-rn there and of RN50 here"),
    ):
        fine = tiny_recipe(folder, "fine", initialize_from="first", **changes)
        assert message in check_stages([first, fine])
    wide, also = (
        tiny_recipe(folder, name, teacher={"model": model}, **more)
        for name, model, more in (
            ("wide", "RN50", {}),
            ("also", "ViT-H-14", {"initialize_from": "wide"}),
        )
    )
    with pytest.raises(RecipeError, match="text space of RN50, not of ViT-H-14; use one teacher"):
        check_stages([wide, also])
    scale = {"class_head": {"scale": 7.0}}
    fine = tiny_recipe(folder, "fine", initialize_from="first", detector=scale)
    with pytest.raises(RecipeError, match=r"detector\.class_head is another"):
        check_stages([first, fine])


INET = {"name": "inet", "format": "imagenet21k", "images": "imagenet21k"}


def test_it_says_which_terms_a_source_has_none_of(folder: Path) -> None:
    labelled = INET | {"annotations": "imagenet21k/wnid_to_lvis.tsv"}
    unlabelled = {"extra": [labelled | {"use_labels": False}]}
    for changes, words in (
        ({"data": {"extra": [labelled]}}, ""),
        ({"data": unlabelled}, "; no class term"),
        ({"data": unlabelled, "semantic": None}, "; no class term"),
        (
            {"data": unlabelled, "semantic": {"labels": "hard"}},
            "; no class or semantic term, for semantic.labels hard learns labels and it gives none",
        ),
    ):
        lines = check_stages([tiny_recipe(folder, "tiny", **changes)]).splitlines()
        assert f"  source      inet (imagenet21k): to be prepared{words}" in lines


def test_labels_that_reach_no_category_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file that tells the categories, or from the index, before anything is made of them."""
    raw = folder / "raw"
    header, *rows = (raw / "imagenet21k/wnid_to_lvis.tsv").read_text().splitlines()
    cells = (f"{row.split(chr(9))[0]}\t{k}\tgear {k}\tgear.n.{k}\tr" for k, row in enumerate(rows))
    assert header.split("\t")[:5] == (
        ["wnid", "lvis_v1_id", "lvis_name", "lvis_synset", "lvis_frequency"]
    )
    (tmp_path / "gears.tsv").write_text(
        "\n".join(["\t".join(header.split("\t")[:5]), *cells]) + "\n"
    )
    categories = {"categories": [{"id": 1, "name": "gear"}], "images": [], "annotations": []}
    (tmp_path / "gears.json").write_text(json.dumps(categories))
    gears = {"name": "gears", "images": "imagenet21k", "annotations": str(tmp_path / "gears.tsv")}
    parts = {"format": "coco", "images": "lvis", "annotations": str(tmp_path / "gears.json")}
    captions = {
        "format": "cc3m",
        "images": "cc3m/images",
        "annotations": "cc3m/Train_GCC-training.tsv",
        "files": {"classes": str(tmp_path / "gears.json")},
    }
    message = r"source gears: none of its \d+ categories is one of the vocabulary's"
    for form in ({"format": "imagenet21k"}, parts, captions):
        with pytest.raises(RecipeError, match=message):
            check_stages([tiny_recipe(folder, "tiny", data={"extra": [gears | form]})])
        check_stages(
            [tiny_recipe(folder, "tiny", data={"extra": [gears | form | {"use_labels": False}]})]
        )

    data = {"extra": [gears | {"format": "imagenet21k"}], "shards": str(tmp_path / "shards")}
    recipe = tiny_recipe(folder, "tiny", data=data, output=str(tmp_path / "runs"))
    monkeypatch.setattr(sources, "_SMALL_FILE", 0)
    check_stages([recipe])  # Not yet known.
    prepare_source(recipe.data.extra[0], recipe.data, in_line)
    with pytest.raises(RecipeError, match=message):
        check_stages([recipe])
    for source in sources_of(recipe):
        prepare_source(source, recipe.data, in_line)
    monkeypatch.setattr(run, "check_stages", lambda _: None)  # As when nothing was prepared.
    with pytest.raises(RecipeError, match=message):
        run.prepare_stages([recipe])
    assert not (tmp_path / "runs").exists()
