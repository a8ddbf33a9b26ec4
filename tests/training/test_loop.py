"""The loop on the real rooms: the same learning whatever the layout, and through interruptions."""

import json
import logging
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import (
    assert_same_end,
    metrics,
    prepare_here,
    start_command,
    tiny_recipe,
    wait_for_step,
    write_recipe,
)

from pipeline.data.batch import Batch, Targets
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.data.stream.batches import StepBatches
from pipeline.detectors.interface import Shares
from pipeline.errors import RecipeError, StopRequested, StorageError
from pipeline.recipe import Recipe
from pipeline.training import loop
from pipeline.training.agreement import agree_on_step
from pipeline.training.build import build_student
from pipeline.training.checkpoint import load_detector, load_state
from pipeline.training.log import RunLog, run_lock
from pipeline.training.loop import join_process_group, train, train_here
from pipeline.training.manifest import checkpoint_dir, newest_verified, verify
from pipeline.training.metrics import remove_lines_after


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    prepare_here(module_path)
    return module_path


@pytest.fixture(scope="module")
def finished(folder: Path) -> Recipe:
    """Eight steps in one process, undisturbed."""
    recipe = tiny_recipe(folder, "finished")
    train_here(recipe)
    return recipe


def test_a_run_writes_what_a_run_directory_has(finished: Recipe) -> None:
    assert [line["step"] for line in metrics(finished)] == list(range(1, 9))
    assert {line["stream"] for line in metrics(finished)} == {"train", "extra"}
    last = json.loads((finished.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    parts = [value for name, value in last.items() if name.startswith("loss/")]
    assert last["loss"] == pytest.approx(sum(parts)) and math.isfinite(last["loss"])
    assert {"loss/class", "loss/box_l1", "loss/box_giou", "loss/semantic"} <= last.keys()
    for key in ("learning_rate", "grad_norm", "images_per_second", "data_wait", "teacher_wait"):
        assert last[key] >= 0
    assert sum(last["samples"].values()) == 4
    # Optimiser steps and passes over the data: 4 of 8 steps have 4 images of each stream.
    index = {s.name: load_index(shards_url(finished.data, s)) for s in finished.data.sources}
    assert last["step"] == 8 and last["epochs"].keys() == {"lvis_train", "imagenet"}
    assert last["epochs"]["imagenet"] == 16 / index["imagenet"].num_samples
    assert 0 < last["epochs"]["lvis_train"] <= 16 / index["lvis_train"].num_samples
    environment = json.loads((finished.run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["deformable_attention"].startswith(("compiled here", "portable ("))
    assert list((finished.run_dir / "tensorboard").iterdir())
    # Of the source whose categories are not the detector's; each line says by what it was mapped.
    [found] = (finished.run_dir / "category_maps").iterdir()
    header, *lines = found.read_text().splitlines()
    assert found.name == "imagenet.csv" and header.startswith("source_id,source_name")
    assert lines and all(line.endswith(",synset,") for line in lines)
    newest = newest_verified(finished.run_dir)
    assert newest == checkpoint_dir(finished.run_dir, 8)
    assert verify(newest).recipe_hash == finished.hash()


def test_a_finished_run_is_left_alone(finished: Recipe) -> None:
    before = (finished.run_dir / "metrics.jsonl").stat().st_mtime_ns
    train_here(finished)
    assert (finished.run_dir / "metrics.jsonl").stat().st_mtime_ns == before


def test_stopping_saves_and_the_rest_is_bitwise_equal(finished: Recipe, folder: Path) -> None:
    recipe = tiny_recipe(folder, "stopped")
    with pytest.raises(StopRequested, match="after step 5"):
        train(recipe, torch.device("cpu"), lambda step, loss: step == 5)
    assert newest_verified(recipe.run_dir) == checkpoint_dir(recipe.run_dir, 5)
    train(recipe, torch.device("cpu"), lambda step, loss: False)
    assert_same_end(recipe, finished)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(
    finished: Recipe, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(folder, "damaged")
    with pytest.raises(StopRequested):
        train(recipe, torch.device("cpu"), lambda step, loss: step == 7)
    (checkpoint_dir(recipe.run_dir, 7) / "weights.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        train_here(recipe)
    assert "step_00000007" in caplog.text
    assert_same_end(recipe, finished)


def test_another_recipe_is_refused(finished: Recipe, folder: Path) -> None:
    changed = tiny_recipe(folder, "finished", training={"learning_rate": 2e-3})
    with pytest.raises(RecipeError, match=r"learning_rate was 0.001 and is 0.002.*new name"):
        train_here(changed)


def test_a_checkpoint_holds_no_teacher_and_the_detector_no_branch(finished: Recipe) -> None:
    directory = checkpoint_dir(finished.run_dir, 8)
    state = load_state(directory)
    groups = {name.split(".")[0] for name in state.weights}
    assert groups == {"detector", "branch"}
    assert [name for name in state.weights if name.startswith("branch")] == [
        "branch.projection.weight"
    ]
    trained = {name.split("/", 1)[1] for name in state.moments}
    assert trained <= state.weights.keys() and set(state.averaged) == trained
    detector, vocabulary, recipe = load_detector(directory, use_ema=True)
    assert recipe == finished and vocabulary.num_categories == 12
    assert not any("branch" in name or "visual" in name for name in detector.state_dict())
    averaged = load_file(directory / "averaged.safetensors")
    name = next(iter(dict(detector.named_parameters())))
    assert torch.equal(detector.state_dict()[name], averaged[f"detector.{name}"])


def test_the_branch_changes_nothing_at_inference(folder: Path) -> None:
    device = torch.device("cpu")
    vocabulary = loop.load_index(
        loop.shards_url(tiny_recipe(folder, "x").data, tiny_recipe(folder, "x").data.train[0])
    ).vocabulary
    images = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros((1, 64, 64), dtype=torch.bool)
    outputs = []
    for semantic in ({"weight": 0.5}, None):
        student, teacher = build_student(
            tiny_recipe(folder, "x", semantic=semantic), vocabulary, device
        )
        assert (teacher is None) == (semantic is None)
        assert not any("visual" in name for name, _ in student.named_modules())
        with torch.no_grad():
            outputs.append(student.detector.eval()(images.float() / 255, mask))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].boxes, outputs[1].boxes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("semantic", "losses", "terms"),
    [
        ({"labels": "hard"}, {}, {"semantic", "semantic_dn"}),
        ({"objective": "features", "layers": "all"}, {}, {"semantic", "semantic_0"}),
        ({"columns": "federated", "entropy_weighting": True}, {}, {"semantic"}),
        (None, {"image_level": "max_size"}, {"image_level", "image_level_0"}),
        ({}, {"image_level": "max_score"}, {"image_level", "semantic"}),
    ],
    ids=["hard", "features", "federated", "detic", "detic with the branch"],
)
def test_every_objective_trains(
    folder: Path,
    request: pytest.FixtureRequest,
    semantic: dict[str, object] | None,
    losses: dict[str, object],
    terms: set[str],
) -> None:
    name = request.node.callspec.id.replace(" ", "_")
    detector = tiny_recipe(folder, "any").detector.model_dump()
    detector["losses"] |= losses
    recipe = tiny_recipe(folder, name, semantic=semantic, detector=detector, training={"steps": 2})
    train_here(recipe)
    last = metrics(recipe)[-1]
    assert last["stream"] == "extra" and math.isfinite(last["grad_norm"])
    for term in terms:
        assert last[f"loss/{term}"] > 0, term
    if losses:
        assert last["loss/class"] == last["loss/box_l1"] == last["loss/box_giou_dn"] == 0


def test_fine_tuning_starts_from_another_run(finished: Recipe, folder: Path) -> None:
    recipe = tiny_recipe(
        folder, "fine", initialize_from="finished", training={"steps": 1, "learning_rate": 1e-12}
    )
    train_here(recipe)
    source = load_state(checkpoint_dir(finished.run_dir, 8)).averaged
    target = load_state(checkpoint_dir(recipe.run_dir, 1)).weights
    for name in ("detector.bbox_embed.layers.0.weight", "detector.encoder_class_embed.bias"):
        if name in source:
            torch.testing.assert_close(target[name], source[name], rtol=0, atol=1e-6)


def test_steps_that_are_not_finite_are_recorded_and_too_many_stop_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(folder, "spoilt", training={"max_skipped_steps": 1})
    forward = loop.Engine.forward

    def spoilt(engine: loop.Engine, images: torch.Tensor, *rest: object) -> object:
        losses = forward(engine, images, *rest)
        if int(images.sum()) % 2:
            losses["loss/class"] = losses["loss/class"] * math.nan
        return losses

    monkeypatch.setattr(loop.Engine, "forward", spoilt)
    with pytest.raises(
        RecipeError, match="2 steps had a loss or gradient that is not finite"
    ) as caught:
        train_here(recipe)
    skipped = [line for line in metrics(recipe) if line["event"] == "skipped"]
    assert len(skipped) == 2 and all(line["sample_ids"] for line in skipped)
    # Both steps have a file with their whole batch; the last is named with its samples.
    files = sorted((recipe.run_dir / "not_finite").iterdir())
    assert str(files[1]) in str(caught.value)
    for line, path in zip(skipped, files, strict=True):
        saved = json.loads(path.read_text())
        assert path.name == f"step_{line['step']:08d}.json" and saved["step"] == line["step"]
        assert saved["loss_not_finite"] == line["sample_ids"]
        assert set(saved["loss_not_finite"]) <= set(saved["batch"])
        assert len(saved["batch"]) == recipe.training.batch_size
    assert all(sample in str(caught.value) for sample in skipped[1]["sample_ids"])
    for way_on in ("a higher training.max_skipped_steps", f"initialize_from={recipe.run_dir},"):
        assert way_on in str(caught.value)


def batch_of(*targets: Targets) -> StepBatches:
    images = torch.zeros((len(targets), 3, 4, 4), dtype=torch.uint8)
    mask = torch.zeros((len(targets), 4, 4), dtype=torch.bool)
    return StepBatches(0, [Batch(images, mask, list(targets))], "train", {})


def labels(*columns: int, weight: float = 1.0) -> Targets:
    return Targets(
        torch.rand(len(columns), 4),
        torch.tensor(columns, dtype=torch.int64),
        0,
        (4, 4),
        (4, 4),
        class_weight=weight,
        box_weight=weight,
        semantic_weight=weight,
    )


def test_padding_samples_do_not_count() -> None:
    join_process_group(torch.device("cpu"))
    batches = batch_of(labels(1, 3), labels(-1), labels(), labels(2, 2, weight=0.0))
    facts = agree_on_step(batches, None, False, 5, torch.device("cpu"))
    assert facts.num_boxes == 3 and not facts.stop
    assert facts.labelled.tolist() == [0, 1, 0, 1, 0]
    assert agree_on_step(batches, None, True, 5, torch.device("cpu")).stop
    with pytest.raises(StorageError, match="shard 7"):
        agree_on_step(None, StorageError("shard 7"), False, 5, torch.device("cpu"))


def test_coarse_boxes_do_not_count_where_nothing_learns_from_them() -> None:
    join_process_group(torch.device("cpu"))
    batches = batch_of(labels(1, 3), replace(labels(2, 2, 4), coarse=True))
    facts = agree_on_step(batches, None, False, 5, torch.device("cpu"))
    assert facts.num_boxes == 5 and facts.sampled.tolist() == [0, 1, 2, 1, 1]
    facts = agree_on_step(
        batches, None, False, 5, torch.device("cpu"), coarse_boxes=False, semantics="none"
    )
    assert facts.num_boxes == 2
    assert facts.labelled.tolist() == [0, 1, 2, 1, 1]
    assert facts.sampled.tolist() == [0, 1, 0, 1, 0]
    assert facts.coarse_images == 1


def test_each_stream_is_divided_by_its_own_boxes_that_have_the_term() -> None:
    join_process_group(torch.device("cpu"))
    blind = replace(labels(2, 2, 4), extra=True, class_weight=0.0)
    batches = batch_of(labels(1, 3), blind, replace(labels(0), extra=True, sampled_negatives=False))
    facts = agree_on_step(batches, None, False, 5, torch.device("cpu"))
    assert facts.num_boxes == 6
    assert facts.shares == Shares((3.0, 6.0), (3.0, 1.5), (3.0, 1.5))
    assert facts.labelled.tolist() == [1, 1, 0, 1, 0] and facts.sampled.tolist() == [0, 1, 0, 1, 0]
    alone = agree_on_step(batch_of(labels(1, 3)), None, False, 5, torch.device("cpu"))
    assert alone.shares == Shares()
    unmapped = batch_of(labels(1, -1, -1))
    facts = agree_on_step(unmapped, None, False, 5, torch.device("cpu"))
    assert facts.shares == Shares(classes=(3.0, 1.0)) and facts.num_boxes == 3
    facts = agree_on_step(unmapped, None, False, 5, torch.device("cpu"), semantics="hard")
    assert facts.shares == Shares(classes=(3.0, 1.0), semantics=(3.0, 1.0))


def test_lines_after_the_resumed_step_go_and_so_does_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "step", "step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"event": "st')
    remove_lines_after(tmp_path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert path.read_text().endswith("\n")


def test_a_log_goes_on_where_it_was(folder: Path) -> None:
    recipe = tiny_recipe(folder, "logged")
    for start in (0, 2):
        with RunLog(recipe, start) as log:
            for step in range(start + 1, start + 5):
                log.write("step", step, {"loss": float(start)})
    assert [(line["step"], line["loss"]) for line in metrics(recipe)] == [
        (1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0),
    ]  # fmt: skip


def test_a_run_directory_has_one_writer(tmp_path: Path) -> None:
    with (
        run_lock(tmp_path),
        pytest.raises(StorageError, match="another process is training"),
        run_lock(tmp_path, patience_s=0.0),
    ):
        pass
    with run_lock(tmp_path, patience_s=0.0):
        pass


def test_no_parameter_is_left_out_of_a_step_without_boxes_or_labels(folder: Path) -> None:
    """ZeRO-3 needs it: every parameter takes part whatever the batch holds."""
    recipe = tiny_recipe(folder, "x")
    vocabulary = loop.load_index(loop.shards_url(recipe.data, recipe.data.train[0])).vocabulary
    student, _ = build_student(recipe, vocabulary, torch.device("cpu"))
    images = torch.zeros((2, 3, 64, 64), dtype=torch.uint8)
    mask = torch.zeros((2, 64, 64), dtype=torch.bool)
    soft = [torch.zeros((0, 12)), torch.zeros((0, 12))]
    context = loop.LossContext(1.0, None)
    losses = student(images, mask, [labels(), labels()], context, soft)
    sum(losses.values()).backward()
    missing = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_learn_what_one_does(finished: Recipe, folder: Path, stage: int) -> None:
    recipe = tiny_recipe(folder, f"torchrun{stage}", training={"zero_stage": stage})
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    path = write_recipe(folder, recipe)
    process = start_command(
        *words, "-m", "pipeline", "train", str(path), log=folder / "torchrun.log"
    )
    assert process.wait(timeout=240) == 0, (folder / "torchrun.log").read_text()
    for ours, theirs in zip(metrics(recipe), metrics(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["samples"] == theirs["samples"]


@pytest.mark.slow
def test_sigterm_saves_and_exits_75(finished: Recipe, folder: Path) -> None:
    recipe = tiny_recipe(folder, "terminated")
    path, log = write_recipe(folder, recipe), folder / "terminated.log"
    code = (
        "import sys; from pipeline.recipe_file import load_recipe; from pipeline.errors import *\n"
        "from pipeline.training.loop import train_here\n"
        "try: train_here(load_recipe(sys.argv[1]))\n"
        "except StopRequested as error: sys.exit(error.exit_code)"
    )
    process = start_command("-c", code, str(path), log=log)
    wait_for_step(recipe, 4, process, 120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75, log.read_text()
    stopped = newest_verified(recipe.run_dir)
    assert stopped is not None and 4 <= verify(stopped).step < 8
    assert start_command("-c", code, str(path), log=log).wait(timeout=180) == 0, log.read_text()
    assert_same_end(recipe, finished)
