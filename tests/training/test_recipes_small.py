"""Recipes of the paper's experiments, made small: two steps of each on the tiny world."""

import math
from pathlib import Path

import pytest
from tiny_world import in_line, metrics, prepare_here, tiny_recipe

from pipeline.data.shards.preparing import prepare_source
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
# Left out: richsem_r50_o365, since the tiny world's Objects365 shares no category with its LVIS;
# OpenImages and Visual Genome, which that world has not (they are built as richsem_r50_inet_unl).
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
    "richsem_r50_o365_box": SEMANTIC,
    "richsem_swin_b": SEMANTIC,
    "richsem_swin_l": SEMANTIC,
    "richsem_swin_t": SEMANTIC,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes_small")
    prepare_here(path)
    return path


def small(folder: Path, name: str) -> Recipe:
    """A recipe with its kinds of data, losses and backbone, at the sizes of `tiny_recipe`."""
    tree = load_recipe(RECIPES / f"{name}.yaml").model_dump(mode="json")
    tiny = tiny_recipe(folder, name).model_dump(mode="json")
    data, detector = tree["data"], tree["detector"]
    for source in [*data["train"], *data["extra"]]:
        images, annotations = PLACES[source["format"]]
        source["images"] = images
        if source["annotations"] is not None or source["format"] == "cc3m":
            source["annotations"] = annotations
    for key in ("root", "shards", "samples_per_shard", "workers"):
        data[key] = tiny["data"][key]
    data["transforms"] = tiny["data"]["transforms"] | {"mosaic": data["transforms"]["mosaic"]}
    data["validation"] = None
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
def test_a_recipe_made_small_trains_on_what_it_names(folder: Path, name: str) -> None:
    recipe = small(folder, name)
    for source in recipe.data.sources:
        prepare_source(source, recipe.data, in_line)
    train_here(recipe)
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
