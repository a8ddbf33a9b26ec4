"""Ray: tasks and errors, and runs that lose a worker or the driver and end the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_world import (
    ENVIRONMENT,
    ROOT,
    assert_same_end,
    metrics,
    prepare,
    start_command,
    tiny_recipe,
    wait_for_step,
    write_recipe,
)

from pipeline.recipe import Recipe
from pipeline.training.manifest import newest_verified, read_manifest

pytestmark = pytest.mark.slow

START_S = 240
"""Seconds that Ray, its workers and their imports may take on a busy machine of two cores."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    prepare(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Recipe:
    recipe = tiny_recipe(folder, "undisturbed")
    assert finish(start(folder, recipe)) == 0, log_of(folder)
    return recipe


def start(folder: Path, recipe: Recipe) -> subprocess.Popen[bytes]:
    path = write_recipe(folder, recipe)
    return start_command("-m", "pipeline", "train", str(path), log=folder / "commands.log")


def finish(process: subprocess.Popen[bytes], seconds: float = START_S) -> int:
    return process.wait(timeout=seconds)


def log_of(folder: Path) -> str:
    return (folder / "commands.log").read_text(errors="replace")[-5000:]


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(pid, []))
    for child in found:
        found.extend(children.get(child, []))
    return found


def training_workers(pid: int) -> list[int]:
    def title(number: int) -> bytes:
        try:
            return Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            return b""

    return [number for number in descendants(pid) if b"RayTrainWorker" in title(number)]


def test_a_killed_worker_is_replaced_and_the_end_is_the_same(
    folder: Path, undisturbed: Recipe
) -> None:
    recipe = tiny_recipe(folder, "worker_killed")
    process = start(folder, recipe)
    wait_for_step(recipe, 5, process, START_S)
    workers = training_workers(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert finish(process) == 0, log_of(folder)
    assert_same_end(recipe, undisturbed)


def test_sigterm_saves_and_the_same_command_goes_on_even_after_sigkill(
    folder: Path, undisturbed: Recipe
) -> None:
    recipe = tiny_recipe(folder, "driver_killed")
    process = start(folder, recipe)
    wait_for_step(recipe, 2, process, START_S)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert finish(process, 60) == 75, log_of(folder)
    assert time.monotonic() - begun < 30
    stopped = newest_verified(recipe.run_dir)
    assert stopped is not None and 2 <= read_manifest(stopped).step < 8
    assert read_manifest(stopped).step == metrics(recipe)[-1]["step"]

    process = start(folder, recipe)
    wait_for_step(recipe, 7, process, START_S)
    process.kill()
    process.wait()

    assert finish(start(folder, recipe)) == 0, log_of(folder)
    assert_same_end(recipe, undisturbed)


def test_an_error_of_the_recipe_comes_without_a_traceback(
    folder: Path, undisturbed: Recipe
) -> None:
    changed = tiny_recipe(folder, "undisturbed", training={"steps": 9})
    process = start(folder, changed)
    assert finish(process) == 78
    last = log_of(folder).strip().splitlines()[-1]
    assert "training.steps was 8 and is 9" in last and "Traceback" not in last


def test_an_error_inside_a_worker_keeps_its_class(folder: Path) -> None:
    recipe = tiny_recipe(folder, "spoilt", training={"learning_rate": 1e30, "clip_norm": 0.0})
    recipe = Recipe.model_validate(
        {
            **recipe.model_dump(),
            "training": {**recipe.training.model_dump(), "max_skipped_steps": 0},
        }
    )
    process = start(folder, recipe)
    assert finish(process) == 78, log_of(folder)
    assert "more than training.max_skipped_steps 0" in log_of(folder)
    assert "Traceback" not in log_of(folder).split("spoilt")[-1]


TASKS = """
import os, sys, time
from pathlib import Path
from pipeline.cluster import run_tasks, start_ray, stop_ray
from pipeline.errors import DataError
from pipeline.recipe import Cluster

def square(number):
    return number * number

def die_once(path):
    if not os.path.exists(path):
        Path(path).touch()
        os.kill(os.getpid(), 9)
    return os.getcwd()

def refuse(number):
    raise DataError(f"sample {number} is bad")

start_ray(Cluster(workers=2))
assert "torch" not in sys.modules
assert sorted(run_tasks(square, range(20))) == [(i, i * i) for i in range(20)]
assert list(run_tasks(square, [])) == []
assert dict(run_tasks(die_once, [sys.argv[1]])) == {0: os.getcwd()}
try:
    list(run_tasks(refuse, [7]))
except DataError as error:
    assert str(error) == "sample 7 is bad", error
else:
    raise AssertionError("no error")
assert "RAY_AUTH_TOKEN" in os.environ
stop_ray()
"""


LIVE = """
import logging, os, sys, time
from pathlib import Path
from pipeline.cluster import LiveEvaluation, start_ray, stop_ray
from pipeline.errors import DataError
from pipeline.recipe import Recipe
from pipeline.training.manifest import evaluation_done, request_evaluation, waiting_for_evaluation

recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
logging.basicConfig(level=logging.INFO, format="%(message)s")
for step in (2, 4):
    directory = recipe.run_dir / "checkpoints" / f"step_{step:08d}"
    directory.mkdir(parents=True)
    request_evaluation(directory)

def evaluate(recipe):
    directory = waiting_for_evaluation(recipe.run_dir)[0]
    if directory.name.endswith("4"):
        raise DataError("image 7 is bad")
    died = directory / "died"
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), 9)
    evaluation_done(directory)
    return f"evaluated {directory.name}"

start_ray(recipe.cluster)
live = LiveEvaluation(recipe, evaluate)
while live.poll():
    time.sleep(0.2)
live.close()
assert not waiting_for_evaluation(recipe.run_dir)
for step in range(10, 16):
    directory = recipe.run_dir / "checkpoints" / f"step_{step:08d}"
    directory.mkdir()
    request_evaluation(directory)
much = recipe.evaluation.model_copy(update={"cpus": 4096})
impossible = LiveEvaluation(recipe.model_copy(update={"evaluation": much}), evaluate)
for _ in range(4):
    impossible.poll()
assert not waiting_for_evaluation(recipe.run_dir)
assert not LiveEvaluation(recipe, None).poll()
stop_ray()
"""


def test_a_live_evaluation_that_dies_is_begun_again_and_a_bad_one_given_up(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "live")
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    (tmp_path / "live.py").write_text(LIVE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "live.py"), str(tmp_path / "recipe.json")],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "step_" in line]
    assert said[0].startswith("evaluation of step_00000002 failed, trying again")
    assert said[1] == "evaluated step_00000002"
    assert [("trying again: image 7" in line) for line in said[2:5]] == [True, True, False]
    assert "step_00000004 is given up, training goes on without it: image 7 is bad" in said[4]
    assert ["training is faster than its evaluations" in line for line in said[5:]] == [
        *[True] * 3, *[False] * 3,
    ]  # fmt: skip
    assert "evaluation.cpus is 4096 and the cluster has" in said[-1]


def test_tasks(tmp_path: Path) -> None:
    script = tmp_path / "tasks.py"
    script.write_text(TASKS)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "died")],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
