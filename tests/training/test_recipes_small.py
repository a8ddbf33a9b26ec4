"""Recipes of the paper's experiments, made small: two steps of each on the tiny world."""

import csv
import json
import math
from functools import partial
from pathlib import Path
from threading import Event

import pytest
from other_forms import (
    OPENIMAGES,
    VISUAL_GENOME,
    as_openimages,
    as_visual_genome,
    name_as_in_lvis,
)
from tiny_world import in_line, metrics, prepare_here, tiny_recipe

from pipeline.data.shards.ground_truth import FILE
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.errors import StorageError
from pipeline.evaluation.checkpoints import (
    checkpoint_to_evaluate,
    evaluate_all_waiting,
    evaluate_newest,
)
from pipeline.preparation import prepare_sources
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.training.loop import train_here

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PLACES = {
    "lvis": ("lvis", "annotations/lvis_v1_train.json"),
    "imagenet21k": ("imagenet21k", "imagenet21k/wnid_to_lvis.tsv"),
    "objects365": ("objects365", "objects365/zhiyuan_objv2_train.json"),
    "cc3m": ("cc3m/images", "cc3m/Train_GCC-training.tsv"),
}
# timm's smallest FocalNet takes minutes here, in bfloat16 on a CPU: test_families.py has it.
BODIES: dict[str, dict[str, object]] = {
    "resnet": {"name": "resnet18", "norm": "group", "arguments": {}},
    "swin": {"norm": "own", "arguments": {"embed_dim": 12, "num_heads": [1, 1, 2, 2]}},
    "focalnet": {
        "name": "resnet18",
        "norm": "group",
        "drop_path": 0.0,
        "checkpointed_stages": 0,
    },
}
FORMS = {"openimages": OPENIMAGES, "visual_genome": VISUAL_GENOME}
"""Recipes of these are evaluated too; the others are on LVIS, which test_checkpoints.py has."""
TITLES = {
    "richsem_r50_openimages": "OpenImages box AP, COCO-style",
    "richsem_r50_visual_genome": "Visual Genome box AP, COCO-style",
}
SEMANTIC, DETIC = {"loss/semantic", "loss/semantic_dn"}, {"loss/image_level"}
LEARNT = {
    "dino_r50": set(),
    "dino_r50_drop50": set(),
    "detic_dino_r50": DETIC,
    "o365_focal_h": set(),
    "richsem_focal_h": SEMANTIC,
    "richsem_r50_21k": SEMANTIC,
    "richsem_r50_cc_unl": SEMANTIC,
    "richsem_r50_drop50": SEMANTIC,
    "richsem_r50_inet_lvis": SEMANTIC,
    "richsem_r50_inet_unl": SEMANTIC,
    "richsem_r50_o365": SEMANTIC,
    "richsem_r50_o365_box": SEMANTIC,
    "richsem_r50_openimages": SEMANTIC,
    "richsem_r50_visual_genome": SEMANTIC,
    "richsem_swin_b": SEMANTIC,
    "richsem_swin_l": SEMANTIC,
    "richsem_swin_t": SEMANTIC,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes_small")
    prepare_here(path)
    as_openimages(path / "raw")
    as_visual_genome(path / "raw")
    name_as_in_lvis(path / "raw")
    return path


def small(folder: Path, name: str) -> Recipe:
    """A recipe with its kinds of data, losses and backbone, at the sizes of `tiny_recipe`."""
    tree = load_recipe(RECIPES / f"{name}.yaml").model_dump(mode="json")
    tiny = tiny_recipe(folder, name).model_dump(mode="json")
    data, detector = tree["data"], tree["detector"]
    for source in [*data["train"], *data["extra"]]:
        if source["format"] in FORMS:
            source.update(FORMS[source["format"]]["train"])
            continue
        images, annotations = PLACES[source["format"]]
        source["images"] = images
        if source["annotations"] is not None or source["format"] == "cc3m":
            source["annotations"] = annotations
    for key in ("root", "shards", "samples_per_shard", "workers"):
        data[key] = tiny["data"][key]
    data["transforms"] = tiny["data"]["transforms"] | {"mosaic": data["transforms"]["mosaic"]}
    form = data["validation"] and FORMS.get(data["validation"]["format"])
    data["validation"] = form["validation"] if form else None
    tree["evaluation"] |= {"every": 1, "subset_images": 2, "example_images": 1}
    tree |= {key: tiny[key] for key in ("output", "teacher", "cluster")} | {"initialize_from": None}
    body = detector["backbone"]
    family = next(kind for kind in BODIES if body["name"].startswith(kind))
    detector["backbone"] = body | {"weights": None, "frozen_stages": 0} | BODIES[family]
    for key in ("hidden_dim", "num_heads", "num_points", "encoder_layers", "decoder_layers"):
        detector[key] = tiny["detector"][key]
    for key in ("ffn_dim", "num_queries", "denoising"):
        detector[key] = tiny["detector"][key]
    detector["losses"]["federated_categories"] = min(8, detector["losses"]["federated_categories"])
    own = {key: tree["training"][key] for key in ("activation_checkpointing", "precision")}
    tree["training"] = tiny["training"] | own | {"steps": 2, "ema_decay": 0.0}
    return Recipe.model_validate(tree | {"cluster": tiny["cluster"] | {"workers": 1}})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LEARNT))
def test_a_recipe_made_small_trains_on_what_it_names(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(folder, name)
    # Shards are written here, without a cluster.
    monkeypatch.setattr("pipeline.preparation._tasks", lambda *_: in_line)
    prepare_sources(recipe, Event())
    train_here(recipe, partial(evaluate_all_waiting, recipe))
    lines = [line for line in metrics(recipe) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(float(str(line["loss"]))) for line in lines)
    seen = {key for line in lines for key in line if key in SEMANTIC | DETIC}
    assert seen == LEARNT[name]
    # Extra data have the second step for their own.
    samples = {s.name: 4 for s in [*recipe.data.train, *recipe.data.extra]}
    if not recipe.data.extra:
        samples = {recipe.data.train[0].name: 8}
    assert lines[-1]["consumed"]["samples"] == samples  # type: ignore[index, call-overload]
    if name in TITLES:
        is_evaluated_beside_and_after(recipe, TITLES[name])


def is_evaluated_beside_and_after(recipe: Recipe, title: str) -> None:
    [beside] = [line for line in metrics(recipe) if line["event"] == "evaluation"]
    assert (beside["step"], beside["subset"]) == (1, "2 of 5 images")
    assert evaluate_newest(recipe).startswith(title)
    results = json.loads((recipe.run_dir / "results.json").read_text())
    assert 0 <= results["AP"] <= results["AP50"] <= 1 and results["counts"]["images"] == 5
    groups = 5 if recipe.data.train[0].format == "openimages" else 0
    assert results["counts"]["group_boxes"] == groups
    # Nineteen boxes are drawn on the images of the validation part.
    assert results["counts"]["instances"] == 19 - groups
    trained = load_index(shards_url(recipe.data, recipe.data.train[0])).vocabulary
    with (recipe.run_dir / "evaluations/step_00000002/per_category.csv").open() as file:
        named = [(int(row["category_id"]), row["name"]) for row in csv.DictReader(file)]
    assert named == list(zip(trained.ids, trained.names, strict=True)) and len(named) == 6
    assert recipe.data.validation is not None
    truth = Path(f"{shards_url(recipe.data, recipe.data.validation)}/{FILE}")
    truth.unlink()
    # Before anything is detected.
    with pytest.raises(StorageError, match=r"ground_truth\.json is missing"):
        checkpoint_to_evaluate(recipe)
