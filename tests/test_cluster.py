"""Ray: tasks and errors, and runs that lose a worker or the driver and end the same."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from processes import descendants
from tiny_world import (
    assert_same_end,
    metrics,
    prepare,
    run_command,
    start_command,
    tiny_recipe,
    wait_for_step,
    write_recipe,
)

from pipeline.recipe import Recipe
from pipeline.training.manifest import newest_verified, read_manifest

pytestmark = pytest.mark.slow

START_S = 900
"""Only what hangs takes so many seconds: Ray, its workers and their imports on a busy machine."""
HANG_S = 90
"""Longer than a stage of a tiny run takes on a busy machine; where it is not, the run goes on."""


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    prepare(module_path)
    return module_path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Recipe:
    recipe = tiny_recipe(folder, "undisturbed")
    assert finish(start(folder, recipe)) == 0, log_of(folder)
    return recipe


def start(folder: Path, recipe: Recipe, *overrides: str) -> subprocess.Popen[bytes]:
    words = ("train", str(write_recipe(folder, recipe)), *overrides)
    return start_command("-m", "pipeline", *words, log=folder / "commands.log")


def finish(process: subprocess.Popen[bytes], seconds: float = START_S) -> int:
    return process.wait(timeout=seconds)


def log_of(folder: Path) -> str:
    return (folder / "commands.log").read_text(errors="replace")[-5000:]


def test_a_killed_worker_is_replaced_and_the_end_is_the_same(
    folder: Path, undisturbed: Recipe
) -> None:
    recipe = tiny_recipe(folder, "worker_killed")
    process = start(folder, recipe)
    # Once while the group starts, before it trains, and once in mid-training.
    deadline = time.monotonic() + START_S
    while len(workers := descendants(process.pid, "RayTrainWorker")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, log_of(folder)
        time.sleep(0.05)
    os.kill(workers[1], signal.SIGKILL)
    wait_for_text(folder, "restart 1 of 3, from the beginning", process)
    assert "while the workers started, one was lost: its process ended" in log_of(folder)
    wait_for_step(recipe, 5, process, START_S)
    workers = descendants(process.pid, "RayTrainWorker")
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


def test_a_hung_rank_is_ended_and_a_driver_without_ray_ends_to_go_on(
    folder: Path, undisturbed: Recipe
) -> None:
    """Both in one run, which ends as the undisturbed one; before, it has lost too many workers."""
    cluster = {"hang_timeout": HANG_S, "max_failures": 9}
    recipe = tiny_recipe(folder, "hung", cluster=cluster)
    process = start(folder, recipe, "cluster.max_failures=0", "cluster.hang_timeout=0")
    wait_for_step(recipe, 2, process, START_S)
    os.kill(descendants(process.pid, "RayTrainWorker")[0], signal.SIGKILL)
    assert finish(process) == 75, log_of(folder)
    assert "that was loss 1 of workers, and cluster.max_failures is 0" in log_of(folder)

    process = start(folder, recipe)
    wait_for_step(recipe, 4, process, START_S)
    workers = descendants(process.pid, "RayTrainWorker")
    os.kill(workers[1], signal.SIGSTOP)
    wait_for_text(folder, f"(pid {workers[1]}, node 127.0.0.1) is in '", process)
    wait_for_text(folder, f"(pid {workers[1]}, node 127.0.0.1) was lost: its proc", process)
    wait_for_text(folder, "going on from", process)

    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
    begun = time.monotonic()
    for name in ("gcs_server", "raylet"):
        [found] = [one for one in processes if name_of(one) == name]
        found.kill()
    assert finish(process, 55) == 75, log_of(folder)
    assert time.monotonic() - begun < 50, "Ray ends its driver after 60 s, with another code"
    assert "longtail: Ray is gone: " in log_of(folder)
    _, left = psutil.wait_procs(processes, timeout=30)
    assert [one for one in left if "RayTrainWorker" in title_of(one)] == []

    assert finish(start(folder, recipe)) == 0, log_of(folder)
    assert_same_end(recipe, undisturbed)


def name_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def title_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def wait_for_text(folder: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while text not in log_of(folder):
        assert process.poll() is None and time.monotonic() < deadline, log_of(folder)
        time.sleep(0.2)


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

class Squares:  # arguments that are made when they are asked for
    def __init__(self):
        self.asked = []

    def __len__(self):
        return 100

    def __getitem__(self, position):
        self.asked.append(position)
        return position

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
squares, done = Squares(), 0
for position, result in run_tasks(square, squares):
    done += 1
    assert len(squares.asked) <= done + 2 * os.cpu_count() + 4 and result == position ** 2
assert done == 100 and squares.asked == list(range(100))
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

LISTENING = """
import os, sys, time
from pipeline.cluster import start_ray, stop_ray
import ray
from pipeline.recipe import Cluster
sys.path.append(sys.argv[1])
from processes import listening_addresses

class Idle:
    def port(self):
        return None

try:
    ray.remote(Idle).remote()
except ray.exceptions.RaySystemError as error:
    assert "has not been started" in str(error), error
else:
    raise AssertionError("a Ray that nobody asked for")
start_ray(Cluster(workers=2))
actor = ray.remote(num_cpus=0)(Idle).remote()
ray.get(actor.port.remote())
time.sleep(3)  # Agents of Ray begin to listen some seconds after its first answer.
found = listening_addresses(os.getpid())
assert found == {"127.0.0.1"}, found
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


def run_script(code: str, argument: Path, folder: Path) -> str:
    """What a script of its own process says on standard error; it has to end well."""
    script = folder / "script.py"
    script.write_text(code)
    done = run_command(str(script), str(argument), seconds=START_S)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_live_evaluation_that_dies_is_begun_again_and_a_bad_one_given_up(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "live")
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    errors = run_script(LIVE, tmp_path / "recipe.json", tmp_path)
    said = [line for line in errors.splitlines() if "step_" in line]
    assert said[0].startswith("evaluation of step_00000002 failed, trying again")
    assert said[1] == "evaluated step_00000002"
    assert [("trying again: image 7" in line) for line in said[2:5]] == [True, True, False]
    assert "step_00000004 is given up, training goes on without it: image 7 is bad" in said[4]
    assert ["training is faster than its evaluations" in line for line in said[5:]] == [
        *[True] * 3, *[False] * 3,
    ]  # fmt: skip
    assert "evaluation.cpus is 4096 and the cluster has" in said[-1]


def test_a_ray_of_this_machine_listens_on_loopback_alone(tmp_path: Path) -> None:
    """All of its processes, workers too: an open port of Ray is remote code execution."""
    run_script(LISTENING, Path(__file__).parent, tmp_path)


def test_tasks(tmp_path: Path) -> None:
    run_script(TASKS, tmp_path / "died", tmp_path)
    assert (tmp_path / "died").exists()
