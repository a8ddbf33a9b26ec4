"""The studies of a teacher, end to end on the tiny world, and the words of the command line."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import ENVIRONMENT, ROOT, in_line, prepare, run_command, tiny_recipe, write_recipe

from pipeline.data.shards.index import load_index
from pipeline.data.shards.preparing import prepare_source, shards_url
from pipeline.data.stream.batches import EvaluationSet
from pipeline.data.vocabulary.categories import Category
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Recipe
from pipeline.study.arguments import TOPICS
from pipeline.study.noise import noise, scales_of
from pipeline.study.output import write_outcome
from pipeline.study.teacher_ranks import BoxRanks, Classified
from pipeline.study.zero_shot import PUBLISHED, is_lvis, zero_shot
from pipeline.study.zero_shot_page import describe_teacher, render
from pipeline.training.build import build_teacher

VALIDATION = {
    "name": "lvis_val",
    "format": "lvis",
    "images": "lvis",
    "annotations": "annotations/lvis_v1_val.json",
}
SIZES = {"evaluation_short_side": 64, "evaluation_max_side": 96}
CPU = torch.device("cpu")


def stage(folder: Path, **changes: Any) -> Recipe:
    data = {"validation": VALIDATION, "transforms": SIZES}
    return tiny_recipe(folder, "tiny", data=data, evaluation={"batch_size": 3}, **changes)


@pytest.fixture(scope="module")
def recipe(module_path: Path) -> Recipe:
    torch.set_num_threads(1)
    prepare(module_path)
    found = stage(module_path)
    assert found.data.validation is not None
    prepare_source(found.data.validation, found.data, in_line)
    return found


def answers(recipe: Recipe) -> list[tuple[int, int, int]]:
    """(image, label, rank of the label) of every box, box by box in plain Python."""
    assert recipe.data.validation is not None
    index = load_index(shards_url(recipe.data, recipe.data.validation))
    teacher = build_teacher(recipe, index.vocabulary, CPU)
    found = []
    images = EvaluationSet(recipe.data, index, index.vocabulary)
    for batch in images.iterate(recipe.evaluation.batch_size):
        for soft, target in zip(teacher.soft_labels(batch), batch.targets, strict=True):
            for row, label in zip(soft.tolist(), target.labels.tolist(), strict=True):
                found.append((target.image_id, label, sum(p >= row[label] for p in row) - 1))
    return found


def test_the_teacher_is_described_as_it_is_used(tmp_path: Path) -> None:
    recipe = stage(tmp_path)

    def with_teacher(**changes: Any) -> Recipe:
        return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update=changes)})

    assert "prompts single, boxes read from a map" in describe_teacher(recipe)
    assert "boxes read as crops" in describe_teacher(with_teacher(regions="crops"))
    given = describe_teacher(with_teacher(text_embeddings="clip/names.npy"))
    assert "text of names.npy" in given and "prompts" not in given


def test_zero_shot_counts_what_the_teacher_says(recipe: Recipe, tmp_path: Path) -> None:
    outcome = zero_shot(recipe, device=CPU)
    expected = answers(recipe)
    figures = outcome.figures
    assert figures["boxes"] == len(expected)
    for k in (1, 5, 10):
        right = [rank < k for _, _, rank in expected]
        assert figures["per_box"]["all"][f"top{k}"] == np.mean(right)
    text = write_outcome(tmp_path, outcome)
    assert "published" not in text and figures["published"] == {}
    assert "which these are not" in outcome.page
    with (tmp_path / "teacher-zero-shot_tiny.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == figures["categories"] == 12
    assert sum(int(row["boxes"]) for row in rows) == figures["boxes"]
    weighted = sum(float(row["top1"]) * int(row["boxes"]) for row in rows) / figures["boxes"]
    assert weighted == pytest.approx(figures["per_box"]["all"]["top1"])
    own = {"r": "rare", "c": "common"}
    for letter, name in own.items():
        boxes = sum(int(row["boxes"]) for row in rows if row["frequency"] == letter)
        assert boxes == figures["boxes_of"][name]
    assert json.loads((tmp_path / "teacher-zero-shot_tiny.json").read_text()) == figures
    assert 1 < figures["categories_of_a_soft_label"] < 12
    marks = re.findall(r'<path class="mark \w+"[^>]*><title>[^<]* % of (\d+) boxes', outcome.page)
    assert sorted(map(int, marks)) == sorted(int(r["boxes"]) for r in rows if int(r["boxes"]))
    curves = re.findall(r'<polyline class="line [\w ]+"[^>]*><title>(\w+)<', outcome.page)
    assert curves == [*(name for name in figures["per_box"] if figures["boxes_of"][name]), "chance"]
    assert outcome.lines[-1].startswith(f"temperature {figures['temperature']:.1f}; a soft label")


def test_noise_begins_with_the_true_boxes(recipe: Recipe, tmp_path: Path) -> None:
    exact = zero_shot(recipe, device=CPU).figures["per_box"]
    outcome = noise(recipe, scales_of(3), device=CPU, seed=5)
    assert [row["noise"] for row in outcome.rows] == [0, 0.5, 1]
    first = outcome.rows[0]
    for k in (1, 5, 10):
        assert first[f"top{k}"] == pytest.approx(exact["all"][f"top{k}"])
        assert first[f"top{k}_rare"] == pytest.approx(exact["rare"][f"top{k}"])
    overlaps = [row["mean_iou"] for row in outcome.rows]
    assert overlaps[0] == pytest.approx(1) and overlaps[0] > overlaps[1] > overlaps[2] > 0.1
    assert "uniform in [-1, 1]" in outcome.page
    lines = re.findall(r'<polyline class="line c\d"[^>]*><title>(top-\d+)<', outcome.page)
    assert lines == ["top-1", "top-5", "top-10"]
    again = noise(recipe, scales_of(3), device=CPU, seed=5)
    assert again.rows == outcome.rows, "the seed decides"


def test_some_images_are_drawn_by_the_seed(recipe: Recipe) -> None:
    some = [zero_shot(recipe, device=CPU, images=4, seed=seed) for seed in (0, 0, 1)]
    assert some[0].figures == some[1].figures != some[2].figures
    assert some[0].figures["images"] == 4
    assert f"4 of {some[0].figures['all_images']} images, drawn by the seed" in some[0].page


def lvis_like() -> tuple[Category, ...]:
    names = ["aerosol_can", *(f"thing_{k}" for k in range(1201)), "zucchini"]
    return tuple(
        Category(k, name, frequency="rcf"[k % 3], image_count=k)  # type: ignore[arg-type]
        for k, name in enumerate(names, start=1)
    )


def test_published_figures_stand_beside_those_of_lvis_alone(recipe: Recipe) -> None:
    assert is_lvis(lvis_like()) and not is_lvis(lvis_like()[1:]) and not is_lvis(())
    from pipeline.study import zero_shot as module

    columns = np.arange(1203)
    ranks = BoxRanks(columns, columns % 7, columns, np.ones(1203), np.log(np.full(1203, 4.0)))
    found = Classified(recipe, lvis_like(), (0.0,), (ranks,), 10, 10, 0, 100.0, (0, 2, 0.97))
    figures = module._figures(found)
    assert figures["published"]["rare"] == {"top1": 0.167, "top5": 0.299, "top10": 0.331}
    assert PUBLISHED["all"] == {1: 0.162, 5: 0.296, 10: 0.339}
    page = render(found, module._category_rows(found), figures)
    assert re.search(r"top-1, published</td><td>16\.2</td><td>16\.7</td><td>16\.4</td>", page)
    assert "CLIP RN50 on the boxes of LVIS v1 val" in page
    said = "temperature 100.0; a soft label spreads over 4.0 categories (exp of its entropy, mean)"
    assert f"{said}; names most alike: aerosol_can and thing_1, cosine 0.970" in page


def test_recipes_that_cannot_be_studied_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    blind = stage(tmp_path, semantic=None, detector={"class_head": {"kind": "linear"}})
    with pytest.raises(RecipeError, match="recipe tiny has no teacher"):
        zero_shot(blind, device=CPU)
    bare = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation": None})})
    with pytest.raises(RecipeError, match=r"has no data\.validation"):
        noise(bare, [0.0], device=CPU)
    with pytest.raises(StorageError, match="longtail prepare"):
        zero_shot(stage(tmp_path), device=CPU)
    with pytest.raises(RecipeError, match="--levels is 1"):
        scales_of(1)
    with pytest.raises(RecipeError, match="--images is 0"):
        zero_shot(recipe, device=CPU, images=0)


def test_an_unknown_study_lists_the_names(tmp_path: Path) -> None:
    result = run_command("-m", "pipeline", "study", "teacher", "x.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert all(name in result.stderr for name in TOPICS)
    listed = run_command("-m", "pipeline", "study", "--help", cwd=tmp_path)
    assert listed.returncode == 0 and all(name in listed.stdout for name in TOPICS)


def test_help_of_a_study_is_quick() -> None:
    code = (
        "import sys; from pipeline.cli import build_parser; "
        "build_parser().parse_args(['study', 'frequency', 'a']); "
        "sys.exit(bool({'torch', 'ray', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False).returncode == 0


@pytest.mark.slow
def test_the_command_prepares_what_the_study_needs(tmp_path: Path) -> None:
    recipe = stage(tmp_path).model_dump(mode="json")
    recipe["data"] |= {"miniature": "tiny"}
    recipe["initialize_from"] = "a_run_that_is_not_there"
    path = write_recipe(tmp_path, Recipe.model_validate(recipe))
    words = ("-m", "pipeline", "study", "teacher-noise", str(path), "--levels", "2")
    result = run_command(*words, "-o", str(tmp_path / "out"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "training the teacher" in result.stdout and "mean IoU 1.000" in result.stdout
    shards = {path.name for path in (tmp_path / "raw" / "shards").iterdir()}
    assert shards == {"lvis_val", "cc3m"}, "nothing else is prepared"
    assert (tmp_path / "out" / "teacher-noise_tiny.html").is_file()
    again = run_command(*words, "-o", str(tmp_path / "out"), "--images", "0", cwd=tmp_path)
    assert again.returncode == 78 and "--images is 0" in again.stderr
