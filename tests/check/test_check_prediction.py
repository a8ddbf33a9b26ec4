"""What `longtail check R --workers N` predicts: memory by part, time, data, what does not fit."""

import copy
import json
import re
from pathlib import Path

import pytest
from tiny_world import in_line, run_command, tiny_recipe, write_recipe

from pipeline.check.describe import plan_of
from pipeline.check.needs import sources_of
from pipeline.check.pace import reads_of, step_time
from pipeline.check.prediction import (
    MARGIN,
    Asked,
    data_lines,
    predict_stage,
    refusal,
    run_lines,
    verdict,
)
from pipeline.check.ranks import LAYOUTS, Layout, RankMemory
from pipeline.check.reserved import read_ahead_bytes, reserved_cpus, reserved_gpus
from pipeline.data.miniature.world import draw_world
from pipeline.data.shards.preparing import load_index, prepare_source, shards_url
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prediction")
    draw_world(path / "raw", "tiny", 0)
    recipe = tiny_recipe(path, "any")
    for source in sources_of(recipe):
        prepare_source(source, recipe.data, in_line)
    return path


def cells(text: str, name: str) -> list[float]:
    """The numbers of a line of the table."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [float(cell) for cell in line.strip().removeprefix(name).split()]


def big(folder: Path, name: str = "big", **changes: object) -> Recipe:
    """A model of many parameters for images of few pixels."""
    wide = {"backbone": {"name": "resnet50", "weights": None, "norm": "group", "frozen_stages": 0}}
    detector = tiny_recipe(folder, "any").detector.model_dump() | wide
    return tiny_recipe(folder, name, detector=detector, **changes)


def test_parts_are_those_of_the_model(folder: Path) -> None:
    found = predict_stage(big(folder), Asked(workers=2))
    parameters = cells(found.text, "parameters and buffers")
    megabytes = parameters[0] * 1e3
    # ResNet-50 without its classifier has 23.5 M parameters (torchvision), the rest is tiny.
    assert 94 <= megabytes < 110
    assert parameters[:3] == [parameters[0]] * 3
    assert parameters[3] == pytest.approx(parameters[0] / 2, abs=0.011) and parameters[4] < 0.01
    gradients = cells(found.text, "gradients")
    assert gradients[0] == gradients[1] == pytest.approx(parameters[0], abs=0.011)
    assert gradients[2] == pytest.approx(gradients[0] / 2, abs=0.011)
    moments, averages = cells(found.text, "AdamW's moments"), cells(found.text, "averaged weights")
    assert moments[0] == pytest.approx(2 * gradients[0], abs=0.011)
    assert moments[1] == pytest.approx(moments[0] / 2, abs=0.011)
    assert averages[0] == pytest.approx(gradients[0], abs=0.011)
    others = ["copies, buckets, gathered", "activations", "teacher"]
    parts = [parameters, gradients, moments, averages, *(cells(found.text, n) for n in others)]
    sums = [sum(column) for column in zip(*parts, strict=True)]
    assert cells(found.text, "in all") == pytest.approx(sums, abs=0.04)
    assert found.refusal is None and "batch       4 images = 2 workers x 2" in found.text
    hosts = cells(found.text, "on the host")
    # Moments, averages and three copies of half of what trains, and half of the weights.
    assert hosts[:4] == [0] * 4
    expected = 3 * gradients[0] + parameters[0] / 2
    assert hosts[4] == pytest.approx(expected, abs=0.03)
    whole = re.search(r"a checkpoint is (\S+) GB", found.text)
    assert whole and float(whole[1]) == pytest.approx(4 * parameters[0], abs=0.03)
    moved = big(folder, training={"zero_stage": 1, "offload": "optimizer"})
    columns = predict_stage(moved, Asked(workers=2)).text.splitlines()[3].split("ZeRO")[1:]
    assert [column.strip() for column in columns] == ["0", "1", "2", "3", "3+all", "1+optimizer"]
    one = predict_stage(big(folder, semantic=None), Asked(workers=4))
    assert "4 workers x 1, in 1 micro-steps of 1" in one.text
    assert cells(one.text, "teacher") == [0] * 5
    # Images of 96 pixels take less than the root of the second moments in AdamW's step.
    assert cells(one.text, "activations")[0] == pytest.approx(gradients[0], abs=0.011)


def test_what_does_not_fit_is_refused_with_a_stage_that_would(folder: Path) -> None:
    def of(total: float) -> RankMemory:
        return RankMemory(0, 0, 0, 0, 0, int(total * 1e9), 0, 0, 0)

    memory = dict(zip(LAYOUTS, map(of, [50.0, 30.0, 20.0, 10.0, 5.0]), strict=True))
    recipe = tiny_recipe(folder, "tight", training={"zero_stage": 1})
    found = refusal(recipe, 4, memory, 24.0)
    assert found is not None
    assert "30.0 GB are predicted for each of 4 workers at training.zero_stage 1" in found
    assert "--gpu-memory is 24; ZeRO 2 would fit" in found
    assert refusal(recipe, 4, memory, 30.0) is None and refusal(recipe, 4, memory, None) is None
    hopeless = refusal(recipe, 4, memory, 4.0)
    assert hopeless is not None and "no stage fits" in hopeless
    last = refusal(recipe, 4, memory, 6.0)
    assert last is not None and "ZeRO 3 with training.offload all would fit" in last
    moved = tiny_recipe(folder, "tight", training={"zero_stage": 2, "offload": "optimizer"})
    found = refusal(moved, 4, {Layout(2, "optimizer"): of(30.0), **memory}, 24.0)
    assert found is not None and "at training.zero_stage 2, training.offload optimizer" in found
    assert verdict(int(8e9), 10) == "fits" and verdict(int(9e9), 10) == "tight"
    assert verdict(int(10e9) + 1, 10) == "too much" and 0 < MARGIN < 1


def test_workers_that_do_not_divide_the_batch_are_padded(folder: Path) -> None:
    recipe = tiny_recipe(folder, "uneven", training={"batch_size": 8, "micro_batch": 2})
    text = predict_stage(recipe, Asked(workers=3)).text
    assert "8 images = 3 workers x 3, in 2 micro-steps of 2; 4 of 12 places are padding" in text
    assert "cluster.workers of [least, most]" in text
    assert "padding" not in predict_stage(recipe, Asked(workers=2)).text


def test_gpus_of_teachers_and_of_evaluation_are_paid_for(folder: Path) -> None:
    pool = {"placement": "pool", "actors": 2, "gpus_per_actor": 0.5, "cpus_per_actor": 2}
    changes = {
        "cluster": {"workers": 2, "gpus_per_worker": 1, "cpus_per_worker": 4},
        "teacher": pool,
        "evaluation": {"every": 4, "gpus": 1, "cpus": 3},
        "training": {"steps": 3600},
    }
    unseen = tiny_recipe(folder, "unseen", **changes)
    assert reserved_gpus(unseen, 4) == (4, 1, 0) and reserved_cpus(unseen, 4)[:3] == (16, 4, 0)
    validation = unseen.data.train[0].model_dump() | {"name": "lvis_val"}
    recipe = tiny_recipe(folder, "reserved", **changes | {"data": {"validation": validation}})
    assert reserved_gpus(recipe, 4) == (4, 1, 1) and reserved_cpus(recipe, 4)[:3] == (16, 4, 3)
    total = reserved_gpus(recipe, 4).total
    text = "\n".join(run_lines(recipe, 4, step_time(recipe, 4, 1.0)))
    assert f"{total:g} GPUs (4 for trainers, 1 for teachers, 1 for evaluation)" in text
    assert f"1.00 hours without evaluation; {total:.1f} GPU-hours" in text
    alone = tiny_recipe(folder, "alone", **changes | {"teacher": {}, "evaluation": {"gpus": 1}})
    assert reserved_gpus(alone, 4) == (4, 0, 0)


def test_batches_that_are_read_ahead_take_shared_memory(folder: Path) -> None:
    def of(workers: int) -> int:
        return read_ahead_bytes(tiny_recipe(folder, "read", data={"workers": workers}), 2)

    # 2 images of 96 x 96 with their mask. Two micro-steps: four tasks are given to one process or
    # to two, and so many readings are in use or let go late, with one.
    slab = 4 * 2 * 96 * 96
    assert of(0) == 0 and of(1) == of(2) == (4 + 4 + 1) * slab
    assert of(4) == (2 * 4 + 5) * slab


def test_whole_shards_are_fetched_by_each_machine(folder: Path) -> None:
    reading = {"how": "shards", "cache_gigabytes": 1e-6}
    recipe = tiny_recipe(folder, "whole", data={"reading": reading}, training={"steps": 100})
    here = {s.name: load_index(shards_url(recipe.data, s)) for s in recipe.data.sources}
    plan = plan_of(recipe, here, here["lvis_train"].vocabulary)
    time = step_time(recipe, 2, 1.0)
    in_place = "\n".join(data_lines(recipe, plan, here, time, 2))
    assert "whole shards" not in in_place and "to each worker" in in_place
    away = {name: copy.copy(index) for name, index in here.items()}
    for name, index in away.items():
        index.url = f"s3://bucket/{name}"
    assert plan is not None
    epochs = {n: k / plan.epoch_lengths[n] for n, k in plan.samples_before(100).items()}
    sizes = {n: sum(shard.num_bytes for shard in here[n].shards) for n in epochs}
    for cache, times in ((1e-6, epochs), (1.0, dict.fromkeys(epochs, 1.0))):
        assert all(number > 1 for number in epochs.values())
        kept = recipe.data.reading.model_copy(update={"cache_gigabytes": cache})
        fetched = sum(sizes[n] * times[n] for n in sizes)
        assert reads_of(plan, away, 100, kept).of_machine == pytest.approx(fetched)
    text = "\n".join(data_lines(recipe, plan, away, time, 2))
    assert "by each machine, so storage has to give" in text and "MB/s to each" in text


def test_time_is_given_or_measured_or_unknown(folder: Path) -> None:
    recipe = tiny_recipe(folder, "timed")
    assert step_time(recipe, 2, 0.25) == (0.25, "given")
    unknown = step_time(recipe, 2, None)
    assert unknown.seconds is None and "--step-seconds" in unknown.origin
    recipe.run_dir.mkdir(parents=True)
    lines = [{"event": "step", "step": n, "seconds": s} for n, s in enumerate([9.0, 2.0, 4.0, 3.0])]
    lines.append({"event": "skipped", "step": 4, "seconds": 100.0})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st'
    (recipe.run_dir / "metrics.jsonl").write_text(text)
    assert step_time(recipe, 2, None).seconds is None  # With how many workers is not known.
    (recipe.run_dir / "environment.json").write_text('{"world_size": 2}')
    assert step_time(recipe, 2, None).seconds == 3.0
    other = step_time(recipe, 4, None)
    assert other.seconds is None and "with 2 workers" in other.origin
    text = "\n".join(run_lines(recipe, 2, step_time(recipe, 2, None)))
    assert "step time   3 s (median of" in text and "1.3 images a second" in text
    # 8 steps of 3 s, on two workers without GPUs.
    assert "8 steps in 0.01 hours" in text and "0.0 worker-hours" in text


def test_data_come_from_the_indexes(folder: Path) -> None:
    recipe = tiny_recipe(folder, "data", training={"steps": 100})
    time = step_time(recipe, 2, 36.0)
    indexes = {s.name: load_index(shards_url(recipe.data, s)) for s in recipe.data.sources}
    plan = plan_of(recipe, indexes, indexes["lvis_train"].vocabulary)
    text = "\n".join([*run_lines(recipe, 2, time), *data_lines(recipe, plan, indexes, time, 2)])
    assert "100 steps in 1.00 hours" in text and "2.0 worker-hours" in text
    sizes = {}
    for name, index in indexes.items():
        files = sum(path.stat().st_size for path in Path(index.url).glob("*.tar"))
        sizes[name] = files / index.num_samples
    # Half of the steps are extra ones, whose examples are mosaics of four images.
    train, extra = 4 * sizes["lvis_train"], 4 * 4 * sizes["imagenet"]
    per_step, most = (train + extra) / 2 / 1e6, max(train, extra) / 1e6
    assert f"{per_step:.2f} MB a step, at most {most:.2f}" in text
    assert f"storage has to give {most / 36:.2f} MB/s" in text
    epochs = 50 * 4 / indexes["imagenet"].num_samples
    assert f"{epochs:.2f} of imagenet" in text


def test_data_that_are_not_here_are_no_error(folder: Path) -> None:
    recipe = tiny_recipe(folder / "elsewhere", "absent", cluster={"gpus_per_worker": 1})
    text = predict_stage(recipe, Asked(workers=2, step_seconds=1)).text
    assert "1203 categories, as published" in text and "not prepared here: lvis_train" in text
    assert "0.0 GPU-hours" in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(workers=0), "--workers is 0, and has to be a number above 0"),
        (Asked(workers=-3), "--workers is -3"),
        (Asked(gpu_memory=float("nan")), "--gpu-memory is nan"),
        (Asked(step_seconds=float("inf")), "--step-seconds is inf"),
        (Asked(workers=5), "5 workers are more than the 4 images of training.batch_size"),
    ],
)
def test_bad_amounts_are_refused(folder: Path, asked: Asked, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        predict_stage(tiny_recipe(folder, "tiny"), asked)


@pytest.mark.slow
def test_the_command_says_what_does_not_fit(folder: Path) -> None:
    path = str(write_recipe(folder, tiny_recipe(folder, "command")))
    done = run_command("-m", "pipeline", "check", path, "--workers", "2", "--gpu-memory", "8")
    assert done.returncode == 0, done.stderr
    assert "of 8 GB" in done.stdout and "fits" in done.stdout
    done = run_command("-m", "pipeline", "check", path, "--gpu-memory", "0.001")
    assert done.returncode == 78 and "does not fit" in done.stderr and "in all" in done.stdout
