"""Recipes of the paper's experiments: what they share, steps that follow from epochs, structure."""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import recipe_costs

from pipeline.detectors import build_detector
from pipeline.detectors.memory import training_memory
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe, parse_yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
PATHS = {
    path.stem: path
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
    if "root: /datasets" in path.read_text(encoding="utf-8")
}
NAMES = list(PATHS)
FINE_TUNED = [name for name in NAMES if name != "o365_focal_h"]
ON_LVIS = [n for n in FINE_TUNED if not n.endswith(("openimages", "visual_genome"))]
R50 = [name for name in ON_LVIS if "_r50" in name]
IMAGES = {"openimages": 1_743_042, "visual_genome": 108_077}
LVIS_EPOCH = 7_180
"""Steps of 16 in an epoch of LVIS v1 with repeat factors, at most."""
EPOCHS = {"dino_r50": (12, 11), "dino_r50_drop50": (12, 11)}
CATEGORIES = {"openimages": 601, "visual_genome": 1594, "o365_focal_h": 365}
PUBLISHED = {
    "dino_r50": "AP 32.2 APr 24.1",
    "detic_dino_r50": "AP 33.8 APr 26.9",
    "richsem_r50_inet_lvis": "AP 37.3 APr 30.7",
    "richsem_r50_21k": "AP 40.1 APr 36.1",
    "richsem_swin_b": "AP 46.4 APr 38.5 as cited by SimLTD",
    "richsem_focal_h": "AP 61.2 APr 61.2",
    "richsem_r50_openimages": "AP 41.0",
    "richsem_r50_visual_genome": "AP 7.8",
}


def header(name: str) -> str:
    lines = PATHS[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def row(name: str) -> list[str]:
    """The cells of a recipe's line in docs/experiments.md."""
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| [`{name}`]")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_experiment_has_its_recipe() -> None:
    assert set(NAMES) == {
        "dino_r50",
        "dino_r50_drop50",
        "detic_dino_r50",
        "o365_focal_h",
        "richsem_focal_h",
        "richsem_r50_21k",
        "richsem_r50_cc_unl",
        "richsem_r50_drop50",
        "richsem_r50_inet_lvis",
        "richsem_r50_inet_unl",
        "richsem_r50_o365",
        "richsem_r50_o365_box",
        "richsem_r50_openimages",
        "richsem_r50_visual_genome",
        "richsem_swin_b",
        "richsem_swin_l",
        "richsem_swin_t",
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_states_what_was_published_on_what_and_for_how_long(name: str) -> None:
    text, recipe = header(name), load_recipe(PATHS[name])
    for part in ("# Published: ", "# Hardware of the authors: ", "# Schedule: ", "# Memory: "):
        assert part in text
    assert f"{recipe.training.steps:,} optimiser steps" in text
    assert f"longtail run recipes/{name}.yaml" in text or name == "richsem_focal_h"
    if name in PUBLISHED:
        assert PUBLISHED[name] in recipe.description
    else:
        assert not re.search(r"AP\d* \d", recipe.description)


class Stated(NamedTuple):
    """What a recipe's header says of its cost."""

    gigabytes: str
    of_training: str
    parameters: str
    time: str
    gpus: int
    operations: str


def stated(name: str) -> Stated:
    found = re.search(
        r"# Memory: ([\d.]+ GB) a GPU at worst, counted and not measured "
        r"\(benchmarks/recipe_costs\.py\)\. Weights, gradients and AdamW's moments "
        r"alone\n#   are ([\d.]+ GB) without ZeRO "
        r"\(([\d.]+ M) parameters\)\.\n"
        r"# Time: it has not run on a GPU\. By arithmetic (\d+ \w+) on (\d+) A100: at DINO's "
        r"published 4\.5 images a second on each \(R50\), with ([\d.]+) times\n"
        r"#   its operations an image",
        header(name),
    )
    assert found is not None, header(name)
    worst, of_training, parameters, time, gpus, operations = found.groups()
    return Stated(worst, of_training, parameters, time, int(gpus), operations)


@pytest.mark.parametrize("name", NAMES)
def test_the_time_follows_from_the_published_speed_and_the_operations(name: str) -> None:
    recipe, said = load_recipe(PATHS[name]), stated(name)
    assert said.gpus == recipe.cluster.max_workers
    images = recipe.training.steps * recipe.training.batch_size
    hours = images * float(said.operations) / (recipe_costs.SPEED * said.gpus) / 3600
    number, unit = said.time.split()
    # The operations are rounded to two decimals.
    assert int(number) == pytest.approx(hours / {"hours": 1, "days": 24}[unit], abs=1, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detic_dino_r50", "richsem_r50_inet_lvis", "richsem_swin_t"])
def test_what_is_stated_is_what_is_counted(name: str) -> None:
    cost, said = recipe_costs.cost_of(recipe_costs.read_recipe(name)), stated(name)
    assert (f"{cost.gigabytes:.1f} GB", f"{cost.operations:.2f}") == (
        said.gigabytes,
        said.operations,
    )


@pytest.mark.parametrize("name", ON_LVIS)
def test_what_the_authors_code_gives_all_experiments(name: str) -> None:
    recipe = load_recipe(PATHS[name])
    data, training, detector = recipe.data, recipe.training, recipe.detector
    assert training.batch_size == 16
    assert (training.learning_rate, training.backbone_learning_rate) == (1e-4, 1e-5)
    assert (training.weight_decay, training.clip_norm, training.drop_factor) == (1e-4, 0.1, 0.1)
    assert training.warmup_steps == 0 and training.schedule == "step"
    assert (data.sampling, data.repeat_threshold) == ("repeat_factor", 0.001)
    assert (data.extra_mode, data.extra_ratio) == ("alternate", 1.0)
    assert data.validation is not None and data.validation.annotations == "lvis/lvis_v1_val.json"
    assert (detector.num_queries, detector.encoder_layers, detector.decoder_layers) == (900, 6, 6)
    assert detector.losses.federated_categories == 50 and detector.losses.federated_power == 0.5
    assert evaluation_limit(recipe) == 300
    if recipe.semantic is not None:
        assert (recipe.semantic.weight, recipe.teacher.model) == (0.5, "RN50")
        assert recipe.teacher.pretrained == "openai"
        assert (detector.class_head.kind, detector.class_head.scale) == ("language", 100.0)


def evaluation_limit(recipe: Recipe) -> int:
    return recipe.evaluation.max_detections


@pytest.mark.parametrize("name", FINE_TUNED)
def test_steps_are_epochs_times_images_over_batch_for_each_stream(name: str) -> None:
    recipe = load_recipe(PATHS[name])
    [images] = [n for key, n in IMAGES.items() if name.endswith(key)] or [None]
    epoch = LVIS_EPOCH if images is None else -(-images // recipe.training.batch_size)
    epochs, drop = EPOCHS.get(name, (24, 20))
    streams = 2 if recipe.data.extra else 1
    assert recipe.training.steps == epochs * epoch * streams
    assert recipe.training.drop_steps == [drop * epoch * streams]


def test_an_epoch_of_lvis_is_what_its_published_counts_bound_it_by(shared_data: Path) -> None:
    counts = shared_data / "detic_metadata" / "lvis_v1_train_cat_info.json"
    images, threshold = 100_170, 0.001
    repeats = sum(
        n * ((threshold * images / n) ** 0.5 - 1)
        for n in (category["image_count"] for category in json.loads(counts.read_text()))
        if 0 < n < threshold * images
    )
    # Categories of one image share its repeats, so this is the most.
    assert round(images + repeats) == 114_868
    assert -(-round(images + repeats) // 16) == LVIS_EPOCH


@pytest.mark.parametrize("name", [n for n in R50 if n.startswith("richsem") and "21k" not in n])
def test_kinds_of_extra_data_differ_in_their_source_alone(name: str) -> None:
    recipe, base = load_recipe(PATHS[name]), load_recipe(PATHS["richsem_r50_inet_lvis"])
    assert recipe.detector == base.detector and recipe.training == base.training
    assert recipe.semantic == base.semantic and recipe.teacher == base.teacher
    if not name.endswith("drop50"):
        assert recipe.data.model_copy(update={"extra": base.data.extra}) == base.data


@pytest.mark.parametrize("form", IMAGES)
def test_other_data_sets_are_evaluated_on_their_own_held_out_part(form: str) -> None:
    data = load_recipe(PATHS[f"richsem_r50_{form}"]).data
    [train] = data.train
    assert data.validation is not None and data.validation.format == train.format == form
    assert data.validation.annotations != train.annotations


def test_labels_are_used_where_the_extra_data_have_them() -> None:
    extra = {name: load_recipe(PATHS[name]).data.extra for name in NAMES}
    assert {name for name, sources in extra.items() if sources and not sources[0].has_labels} == {
        "richsem_r50_cc_unl",
        "richsem_r50_inet_unl",
        "richsem_r50_o365_box",
        "richsem_r50_openimages",
        "richsem_r50_visual_genome",
    }
    detic = load_recipe(PATHS["detic_dino_r50"])
    assert detic.detector.losses.image_level == "max_size" and detic.semantic is None
    assert detic.detector.losses.weight_image_level == 0.1 and not detic.data.transforms.mosaic


@pytest.mark.parametrize("name", NAMES)
def test_overrides_that_a_recipe_names_are_read(name: str) -> None:
    for line in header(name).splitlines():
        overrides = [word.rstrip(".,;)") for word in re.findall(r"\b[a-z][\w.]+=\S+", line)]
        tree = load_recipe(PATHS[name], overrides).model_dump(mode="json")
        for override in overrides:
            key, _, value = override.partition("=")
            node: Any = tree
            for part in key.split("."):
                node = node[int(part) if part.isdigit() else part]
            assert node == parse_yaml(value, override), override


@pytest.mark.parametrize("percent", range(10, 100, 10))
def test_every_fraction_of_annotations_is_three_overrides(percent: int) -> None:
    """Each has runs and shards of its own, and nothing else differs."""
    for name in ("dino_r50_drop50", "richsem_r50_drop50"):
        [line] = [each for each in header(name).splitlines() if "lvis_train_drop90" in each]
        overrides = line.replace("drop90", f"drop{percent}").lstrip("# ").split()
        found, half = load_recipe(PATHS[name], overrides), load_recipe(PATHS[name])
        changed = {"name": found.name, "data": found.data}
        assert half.model_copy(update=changed) == found
        [source] = found.data.train
        assert source.annotations == f"lvis/lvis_v1_train_drop{percent}.json"
        assert found.name == name.replace("drop50", f"drop{percent}")
        assert source.name == f"lvis_train_drop{percent}"


def test_the_fine_tuned_focalnet_takes_the_weights_of_its_pre_training() -> None:
    before, after = (load_recipe(PATHS[n]) for n in ("o365_focal_h", "richsem_focal_h"))
    assert after.initialize_from == before.name
    free = {"losses": True}
    assert before.detector.model_dump(exclude=free) == after.detector.model_dump(exclude=free)
    assert before.teacher == after.teacher


@pytest.mark.parametrize("name", NAMES)
def test_the_page_on_experiments_says_what_the_recipe_says(name: str) -> None:
    recipe, said = load_recipe(PATHS[name]), stated(name)
    _, _, published, hardware, steps, memory, time = row(name)
    assert memory == f"{said.gigabytes} a GPU, {said.parameters}"
    assert time == f"{said.time} on {said.gpus}"
    assert steps == f"{recipe.training.steps:,}"
    for figure in re.findall(r"\d+\.\d", PUBLISHED.get(name, "")):
        assert figure in published
    if name not in PUBLISHED:
        assert not re.search(r"\d\.\d", published)
    assert ("8 GPUs" in hardware) == ("8 GPUs" in header(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_detector_is_built_and_holds_what_is_stated(name: str) -> None:
    recipe = load_recipe(PATHS[name], ["detector.backbone.weights=pretrained"])
    [categories] = [n for key, n in CATEGORIES.items() if name.endswith(key)] or [1203]
    language = recipe.detector.class_head.kind == "language"
    with torch.device("meta"):  # Without memory.
        detector = build_detector(
            recipe.detector,
            num_categories=categories,
            text_embeddings=torch.empty(categories, 1024) if language else None,
            pretrained=False,
        )
    assert stated(name).of_training == f"{training_memory(detector).total / 1e9:.2f} GB"
    number = sum(p.numel() for p in detector.parameters())
    assert stated(name).parameters == f"{number / 1e6:.1f} M"
