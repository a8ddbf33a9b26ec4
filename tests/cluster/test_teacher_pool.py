"""The pool of teachers: labels equal to those in process, whatever happens to its actors."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from processes import descendants
from safetensors.torch import save_file
from tiny_world import (
    assert_same_end,
    metrics,
    prepare_here,
    run_command,
    start_command,
    tiny_recipe,
    wait_for_step,
    write_recipe,
)

from pipeline.check import check_stages
from pipeline.cluster.teacher_actor import recipe_actors
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_from_tree
from pipeline.semantics.clip import new_clip
from pipeline.training.loop import train_here

START_S = 900
"""Only what hangs takes so long: a dozen processes import torch, on whatever a machine has left."""
POOL = {"placement": "pool", "batches_ahead": 2}
BEGINNING = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch.nn.functional import normalize
from pipeline.cluster import start_ray, stop_ray  # first: it sets what Ray reads
import ray
from pipeline.cluster import teacher_pool
from pipeline.cluster.teacher_actor import start_actors
from pipeline.cluster.teacher_pool import TeacherPool
from pipeline.data.batch import Targets, collate
from pipeline.errors import DataError, LongtailError
from pipeline.recipe import Cluster, Teacher as Section
from pipeline.semantics.soft_labels import InProcess
from pipeline.semantics.teacher import Teacher

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def batch_of(number):
    generator = torch.Generator().manual_seed(number)
    images, targets = [], []
    for i in range(2):
        size = tuple(int(s) for s in torch.randint(60, 100, (2,), generator=generator))
        images.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator))
        boxes = 0.2 + 0.3 * torch.rand(3 * (number % 3) + i, 4, generator=generator)
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        targets.append(Targets(boxes, labels, number, size, size))
    return collate(images, targets, ["a"] * 2, [f"a/{number}.{i}" for i in range(2)])

def section(**changes):
    weights = str(folder / "weights.safetensors")
    values = {"model": "miniature-rn", "pretrained": weights, "prompts": "single", **changes}
    return Section.model_validate(values)

def make():
    generator = torch.Generator().manual_seed(0)
    text = normalize(torch.randn(40, 64, generator=generator), dim=1)
    return Teacher(section(), text, None, "cpu")

def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

start_ray(Cluster(workers=2))
"""

EQUAL = """
teacher_pool.PATIENCE_S = 600.0  # For a machine that others work on.
for top_k in (None, 5):
    pool_section = section(placement="pool", actors=2, top_k=top_k)
    actors = start_actors(pool_section, make)
    pool, alone = TeacherPool(actors, 2), InProcess(make(), top_k)
    assert pool.temperature == alone.temperature
    batches = [batch_of(number) for number in range(12)]
    for batch in batches[:4]:
        pool.ask(batch)
    for done, batch in enumerate(batches):
        if done == 5:  # With work under way, and with nobody told.
            os.kill(ray.get(actors[0].pid.remote()), signal.SIGKILL)
        if done == 8:  # Both at once.
            for actor in (actors[1], actors[0]):
                try:
                    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
                except ray.exceptions.RayActorError:
                    pass
        for later in batches[done + 4 : done + 5]:
            pool.ask(later)
        assert same(pool.labels(batch), alone.labels(batch)), (top_k, done)
    assert len(pool._sent) == 0
    # Of two workers, each has its own.
    first, second = TeacherPool(actors, 1, 0), TeacherPool(actors, 1, 1)
    for number in range(4):
        first.ask(batches[number]), second.ask(batches[11 - number])
    for number in range(4):
        assert same(second.labels(batches[11 - number]), alone.labels(batches[11 - number]))
        assert same(first.labels(batches[number]), alone.labels(batches[number]))
    for actor in actors:
        ray.kill(actor)
stop_ray()
"""

SILENT = """
teacher_pool.PATIENCE_S = 600.0
teacher_pool.PATIENT_S = 1.0

class Slow:
    temperature = 1.0
    def soft_labels(self, batch):
        if batch.sample_ids[0] == "a/1.0":
            time.sleep(15)  # Slower than any silence that is borne.
        return [torch.full((len(t.boxes), 4), 0.25) for t in batch.targets]

actors = start_actors(section(actors=1), Slow)
pool = TeacherPool(actors, 2)
assert pool.temperature == 1.0
first = ray.get(actors[0].pid.remote())
teacher_pool.SILENT_S = 10.0
pool.ask(batch_of(1))
expected = [torch.full((len(t.boxes), 4), 0.25) for t in batch_of(1).targets]
assert same(pool.labels(batch_of(1)), expected)
assert ray.get(actors[0].pid.remote()) == first, "a slow one was ended"
os.kill(first, signal.SIGSTOP)
for number in (2, 3):
    pool.ask(batch_of(number))
for number in (2, 3):
    expected = Slow().soft_labels(batch_of(number))
    assert same(pool.labels(batch_of(number)), expected)
assert ray.get(actors[0].pid.remote()) != first
try:
    os.kill(first, 0)
except ProcessLookupError:
    pass
else:
    raise AssertionError("the one that hung is still there")
stop_ray()
"""

ERRORS = """
class Fatal:
    temperature = 1.0
    def soft_labels(self, batch):
        if batch.sample_ids[0] == "a/2.0":
            os.kill(os.getpid(), signal.SIGKILL)
        return [torch.full((len(t.boxes), 4), 0.25) for t in batch.targets]

class Refusing(Fatal):
    def soft_labels(self, batch):
        raise DataError("box 3 is bad")

def unloadable():
    raise DataError("the weights are bad")

def raise_(error):
    raise error

def raised(function, *arguments):
    try:
        function(*arguments)
    except LongtailError as error:
        return type(error), str(error)
    raise AssertionError("no error")

pool = TeacherPool(start_actors(section(actors=2), Fatal), 2)
for number in (1, 2, 3):
    pool.ask(batch_of(number))
assert same(pool.labels(batch_of(1)), Fatal().soft_labels(batch_of(1)))
kind, text = raised(pool.labels, batch_of(2))
assert kind is LongtailError, text
assert "4 teacher actors in a row died over the batch of a/2.0" in text, text
assert "teacher.placement=in_process" in text
assert same(pool.labels(batch_of(3)), Fatal().soft_labels(batch_of(3)))

# What Ray says of an actor whose memory or whose node was the reason.
says = [ray.exceptions.NodeDiedError("1"), ray.exceptions.OutOfMemoryError("2")]
truly = teacher_pool.unwrapped
teacher_pool.unwrapped = lambda reference: truly(reference) if not says else raise_(says.pop())
pool.ask(batch_of(1))
assert same(pool.labels(batch_of(1)), Fatal().soft_labels(batch_of(1))) and not says

refusing = TeacherPool(start_actors(section(), Refusing), 2)
refusing.ask(batch_of(1))
assert raised(refusing.labels, batch_of(1)) == (DataError, "box 3 is bad")
bad = TeacherPool(start_actors(section(), unloadable), 2)
assert raised(lambda: bad.temperature) == (DataError, "the weights are bad")

teacher_pool.PATIENCE_S = 3.0
nowhere = TeacherPool(start_actors(section(actors=2, cpus_per_actor=4096), make), 2)
kind, text = raised(lambda: nowhere.temperature)
assert "none of the 2 teacher actors has begun to work" in text and "cpus_per_actor" in text
# That is waited for, and logged, where the labels are taken and not where they are asked for.
begun = time.monotonic()
nowhere.ask(batch_of(1))
assert time.monotonic() - begun < teacher_pool.PATIENCE_S
kind, text = raised(nowhere.labels, batch_of(1))
assert "none of the 2 teacher actors has begun to work" in text, text
stop_ray()
"""


def run_script(code: str, folder: Path) -> None:
    """A script in a process of its own; it has to end well."""
    torch.manual_seed(0)
    save_file(new_clip("miniature-rn").state_dict(), folder / "weights.safetensors")
    script = folder / "script.py"
    script.write_text(BEGINNING + code)
    done = run_command(str(script), str(folder), seconds=START_S)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.slow
def test_labels_are_those_in_process_though_actors_are_killed(tmp_path: Path) -> None:
    run_script(EQUAL, tmp_path)


@pytest.mark.slow
def test_a_teacher_that_hangs_is_ended_and_a_slow_one_is_not(tmp_path: Path) -> None:
    run_script(SILENT, tmp_path)


@pytest.mark.slow
def test_what_goes_wrong_in_a_teacher_is_said_and_a_fatal_batch_is_given_up(tmp_path: Path) -> None:
    run_script(ERRORS, tmp_path)


def pool_recipe(folder: Path, name: str, **teacher: object) -> Recipe:
    return tiny_recipe(folder, name, teacher=POOL | teacher)


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    prepare_here(module_path)
    return module_path


def train_with_pool(folder: Path, recipe: Recipe) -> subprocess.Popen[bytes]:
    path = write_recipe(folder, recipe)
    return start_command("-m", "pipeline", "train", str(path), log=folder / "commands.log")


def log_of(folder: Path) -> str:
    return (folder / "commands.log").read_text(errors="replace")[-5000:]


@pytest.mark.slow
def test_a_run_that_loses_its_teacher_ends_as_one_in_process(folder: Path) -> None:
    """Two workers, who share the actor."""
    alone = tiny_recipe(folder, "alone")
    process = train_with_pool(folder, alone)
    assert process.wait(START_S) == 0, log_of(folder)
    recipe = pool_recipe(folder, "pool")
    process = train_with_pool(folder, recipe)
    wait_for_step(recipe, 3, process, START_S)
    [actor] = descendants(process.pid, "TeacherActor")
    os.kill(actor, signal.SIGKILL)
    assert process.wait(START_S) == 0, log_of(folder)
    assert metrics(recipe)[-1]["step"] == 8
    assert_same_end(recipe, alone)


def test_without_ray_a_pool_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"only Ray can start.*teacher.placement=in_process"):
        train_here(pool_recipe(folder, "refused"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cpus_per_actor": 4096}, r"1 teacher.actors of 4096 CPUs.*teacher.cpus_per_actor=0"),
        ({"gpus_per_actor": 64, "actors": 2}, r"2 teacher.actors of 64 GPUs.*fractions of one"),
    ],
)
def test_a_pool_larger_than_this_machine_is_refused(
    folder: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        check_stages([pool_recipe(folder, "large", **changes)])


def test_an_object_store_too_small_for_the_next_batches_is_refused(folder: Path) -> None:
    recipe = pool_recipe(folder, "full", batches_ahead=9000)
    with pytest.raises(RecipeError, match=r"take \d+ MB, and .*_megabytes is 200"):
        check_stages([recipe])


def test_a_recipe_without_a_pool_starts_no_actors(folder: Path) -> None:
    assert recipe_actors(tiny_recipe(folder, "plain")) == []
    assert recipe_actors(tiny_recipe(folder, "plain", semantic=None, teacher=POOL)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stored": True, "placement": "pool"}, "need no pool"),
        ({"gpus_per_actor": 1.5}, "a fraction of one GPU, or whole ones"),
        ({"top_k": 0}, "top_k"),
        ({"batches_ahead": 0}, "batches_ahead"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    folder: Path, changes: dict[str, object], said: str
) -> None:
    tree = tiny_recipe(folder, "any").model_dump()
    tree["teacher"] = tree["teacher"] | changes
    with pytest.raises(RecipeError, match=said):
        recipe_from_tree(tree, "the recipe")
