"""Evaluation of a run's checkpoints: live on a subset, and at the end on everything."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import in_line, prepare_here, tiny_recipe

from pipeline.data.shards.preparing import prepare_source
from pipeline.errors import DataError, RecipeError, StopRequested
from pipeline.evaluation.average_precision import evaluate_coco
from pipeline.evaluation.checkpoints import (
    evaluate_all_waiting,
    evaluate_newest,
    evaluate_waiting,
    is_evaluated,
)
from pipeline.evaluation.detections import load_detections
from pipeline.evaluation.ground_truth import load_annotations, parse_ground_truth
from pipeline.recipe import Recipe
from pipeline.training.loop import train, train_here
from pipeline.training.manifest import (
    list_checkpoints,
    newest_verified,
    read_manifest,
    waiting_for_evaluation,
)

VALIDATION = {
    "name": "lvis_val",
    "format": "lvis",
    "images": "lvis",
    "annotations": "annotations/lvis_v1_val.json",
}


def live_recipe(folder: Path, name: str, **training: object) -> Recipe:
    """Eight steps, evaluated live after 2, 4 and 6 on a few images."""
    return tiny_recipe(
        folder,
        name,
        data={"validation": VALIDATION},
        training={"keep_checkpoints": 1, **training},
        evaluation={"every": 2, "subset_images": 4, "example_images": 1},
    )


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    prepare_here(module_path)
    recipe = live_recipe(module_path, "any")
    assert recipe.data.validation is not None
    prepare_source(recipe.data.validation, recipe.data, in_line)
    return module_path


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    lines = (recipe.run_dir / "metrics.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


@pytest.fixture(scope="module")
def live(folder: Path) -> Recipe:
    recipe = live_recipe(folder, "live")
    train_here(recipe, partial(evaluate_all_waiting, recipe))
    return recipe


def test_it_is_evaluated_while_it_trains(live: Recipe) -> None:
    evaluations = events(live, "evaluation")
    assert [event["step"] for event in evaluations] == [2, 4, 6]
    truth = parse_ground_truth(load_annotations(Path(live.data.root, VALIDATION["annotations"])))
    rare = {truth.names[c] for c in set(truth.column.tolist()) if truth.frequencies[c] == "r"}
    for event in evaluations:
        number, total = (int(word) for word in event["subset"].split() if word.isdecimal())
        assert 4 <= number < total == len(truth.image_ids)
        assert f"{number} of {total} images" in event["protocol"] and event["seconds"] > 0
        folder = live.run_dir / "evaluations" / f"step_{event['step']:08d}_subset"
        results = json.loads((folder / "results.json").read_text())
        assert results["counts"]["categories_with_ground_truth"]["r"] == len(rare) > 0
        assert results["counts"]["images"] == number
        assert results["APr"] == event["APr"] is not None
    assert not waiting_for_evaluation(live.run_dir)


def test_each_says_what_the_run_has_consumed(live: Recipe) -> None:
    steps = {event["step"]: event for event in events(live, "step")}
    for event in events(live, "evaluation"):
        until = [steps[step]["samples"] for step in range(1, event["step"] + 1)]
        total = {name: sum(one.get(name, 0) for one in until) for name in steps[2]["samples"]}
        total |= {name: sum(one.get(name, 0) for one in until) for name in steps[1]["samples"]}
        assert event["consumed"]["samples"] == {k: v for k, v in total.items() if v}
        assert set(event["consumed"]["instances"]) == set("rcf")
    instances = [sum(e["consumed"]["instances"].values()) for e in events(live, "evaluation")]
    assert 0 < instances[0] < instances[1] < instances[2]


def test_evaluation_changes_nothing_of_the_training(live: Recipe, folder: Path) -> None:
    """Nor does a stop: what is consumed goes on from the checkpoint."""
    plain = live_recipe(folder, "plain")
    with pytest.raises(StopRequested):
        train(plain, torch.device("cpu"), lambda step, loss: step == 5)
    train_here(plain)
    ends = [newest_verified(recipe.run_dir) for recipe in (live, plain)]
    first, second = (read_manifest(end) for end in ends if end is not None)
    assert first.files == second.files
    assert first.consumed == second.consumed and sum(first.consumed["samples"].values()) == 32


def test_checkpoints_wait_for_their_evaluation(folder: Path) -> None:
    """Without an evaluator they pile up, are kept, and are evaluated later, oldest first."""
    recipe = live_recipe(folder, "waiting")
    train_here(recipe)
    waiting = [int(path.name[5:]) for path in waiting_for_evaluation(recipe.run_dir)]
    assert waiting == [2, 4, 6]
    assert [int(path.name[5:]) for path in list_checkpoints(recipe.run_dir)] == [2, 4, 6, 8]
    text = evaluate_waiting(recipe)
    assert text is not None and text.startswith("evaluation at step 2: AP ")
    assert len(waiting_for_evaluation(recipe.run_dir)) == 2
    evaluate_all_waiting(recipe)
    assert evaluate_waiting(recipe) is None


def test_one_that_cannot_be_evaluated_does_not_end_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise DataError("image 7 is bad")

    monkeypatch.setattr("pipeline.evaluation.checkpoints.detect_part", refuse)
    recipe = live_recipe(folder, "refused")
    train_here(recipe, partial(evaluate_all_waiting, recipe))
    newest = newest_verified(recipe.run_dir)
    assert newest is not None and read_manifest(newest).step == 8
    given_up = [r.getMessage() for r in caplog.records if "is given up" in r.getMessage()]
    assert len(given_up) == 3 and "step_00000002" in given_up[0] and "image 7" in given_up[0]
    assert not waiting_for_evaluation(recipe.run_dir)


def test_live_figures_reach_tensorboard_whenever_they_come(live: Recipe, folder: Path) -> None:
    """Of a run that evaluates in line, and of one that is evaluated after its end."""
    late = live_recipe(folder, "late")
    train_here(late)
    evaluate_all_waiting(late)
    for recipe in (live, late):
        events_of = EventAccumulator(str(recipe.run_dir / "tensorboard"))
        events_of.Reload()
        points = [event.step for event in events_of.Scalars("evaluation_subset/AP")]
        assert points == [2, 4, 6]


def test_the_last_evaluation_is_of_everything(live: Recipe) -> None:
    assert not is_evaluated(live)
    text = evaluate_newest(live, official=True)
    assert is_evaluated(live)
    moved = live.model_copy(update={"data": live.data.model_copy(update={"root": "elsewhere"})})
    assert not is_evaluated(moved)
    results = json.loads((live.run_dir / "results.json").read_text())
    assert results["step"] == 8 and "subset" not in results
    assert text.splitlines()[0] == results["protocol"] and "official" in text
    another = live.model_copy(
        update={"evaluation": live.evaluation.model_copy(update={"max_detections": 5})}
    )
    assert not is_evaluated(another)


def as_coco(raw: Path) -> None:
    """The drawn Objects365 data once more in the form of COCO, with a crowd in it."""
    tree = json.loads((raw / "objects365/zhiyuan_objv2_train.json").read_text())
    for image in tree["images"]:
        drawn = raw / "objects365" / image["file_name"]
        image["file_name"] = f"{image['id']:012d}.jpg"
        (raw / "coco").mkdir(exist_ok=True)
        (raw / "coco" / image["file_name"]).write_bytes(drawn.read_bytes())
    crowd = {"id": 10**6, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1}
    tree["annotations"].append({**tree["annotations"][0], **crowd})
    (raw / "coco.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("form", "annotations", "title"),
    [
        ("objects365", "objects365/zhiyuan_objv2_train.json", "Objects365 box AP, COCO"),
        pytest.param("coco", "coco.json", "COCO box AP, IoU", marks=pytest.mark.slow),
    ],
)
def test_exhaustive_data_sets_are_evaluated_as_coco(
    folder: Path, form: str, annotations: str, title: str
) -> None:
    """The figures are pycocotools' on the file of detections that the evaluation leaves."""
    as_coco(folder / "raw")
    objects = {"name": form, "format": form, "images": form, "annotations": annotations}
    recipe = tiny_recipe(
        folder,
        f"on_{form}",
        data={"train": [objects], "extra": [], "validation": {**objects, "name": "val"}},
        training={"steps": 3},
        evaluation={"every": 2, "subset_images": 6, "example_images": 2},
        semantic=None,
    )
    for source in recipe.data.sources:
        prepare_source(source, recipe.data, in_line)
    train_here(recipe, partial(evaluate_all_waiting, recipe))
    text = evaluate_newest(recipe)
    assert text.startswith(title)
    [live] = events(recipe, "evaluation")[:1]
    assert live["subset"] == "6 of 20 images" and live["APr"] is None
    stored = recipe.run_dir / "evaluations" / "step_00000003"
    results = json.loads((stored / "results.json").read_text())
    again = evaluate_coco(
        load_annotations(Path(recipe.data.root, objects["annotations"])),
        load_detections(stored / "detections.json"),
        origin="again",
    )
    assert results["AP50"] == again["AP50"] and results["counts"]["images"] == 20
    assert len(json.loads((stored / "examples.json").read_text())) == 2
    with pytest.raises(RecipeError, match=r"data\.validation is not LVIS"):
        evaluate_newest(recipe, official=True)


def test_without_a_validation_source_nothing_waits(folder: Path) -> None:
    recipe = tiny_recipe(folder, "none", training={"steps": 2}, evaluation={"every": 1})
    train_here(recipe, partial(evaluate_all_waiting, recipe))
    assert not waiting_for_evaluation(recipe.run_dir)
    with pytest.raises(RecipeError, match=r"needs data\.validation"):
        evaluate_newest(recipe)
