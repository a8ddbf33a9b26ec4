"""Functions as Ray tasks: many small ones, or one with the CPUs of the training workers."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from pipeline.cluster.connection import start_ray
from pipeline.cluster.office import POLL_S, Office, OnProgress, open_office, show, wish_to_stop
from pipeline.errors import LongtailError, StopRequested
from pipeline.recipe import Cluster

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    stop: threading.Event | None = None,
) -> Iterator[tuple[int, Result]]:
    """`function(argument)` of each argument as Ray tasks; yields (position, result) as they end.

    A few more tasks than CPUs are under way at a time, and no argument is asked for before its task
    begins: each may be made when it is. A task whose worker dies is tried again;
    what a task raises is raised here. `stop`, or SIGTERM and SIGINT where it is not given, raises
    `StopRequested` between results.
    """
    remote = ray.remote(max_retries=3)(_call)
    limit = 2 * int(ray.cluster_resources().get("CPU", 1))
    positions = iter(range(len(arguments)))
    under_way: dict[Any, int] = {}
    shared = ray.put(function)
    with wish_to_stop(stop) as wish:
        try:
            while True:
                for position in islice(positions, limit - len(under_way)):
                    task = remote.remote(shared, arguments[position], os.getcwd())
                    under_way[task] = position
                if not under_way:
                    return
                ready, _ = ray.wait(list(under_way), timeout=POLL_S)
                if wish.is_set():
                    raise StopRequested("stopped on request; finished parts are kept")
                for reference in ready:
                    position = under_way.pop(reference)
                    yield position, unwrapped(reference)
        finally:
            for reference in under_way:
                ray.cancel(reference, force=True)


def run_alone(
    function: Callable[[Argument, OnProgress], Result],
    argument: Argument,
    section: Cluster,
    on_progress: OnProgress,
    stop: threading.Event | None = None,
) -> Result:
    """`function(argument, report)` as one Ray task, with the CPUs of all training workers or of the
    largest node, whichever are fewer; see `run_reporting`."""
    start_ray(section)
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    cpus = max(1, int(min(section.max_workers * section.cpus_per_worker, largest)))
    gpus = 1 if section.gpus_per_worker else 0
    return run_reporting(function, [argument], cpus, gpus, on_progress, stop)[0]


def run_on_workers(
    function: Callable[[Argument, OnProgress], Result],
    arguments: Sequence[Argument],
    section: Cluster,
    on_progress: OnProgress,
    stop: threading.Event | None = None,
) -> list[Result]:
    """`function(argument, report)` of each argument, each with what a training worker has; see
    `run_reporting`."""
    start_ray(section)
    cpus, gpus = max(1, int(section.cpus_per_worker)), section.gpus_per_worker
    return run_reporting(function, arguments, cpus, gpus, on_progress, stop)


def run_reporting(
    function: Callable[[Argument, OnProgress], Result],
    arguments: Sequence[Argument],
    cpus: int,
    gpus: float,
    on_progress: OnProgress,
    stop: threading.Event | None = None,
) -> list[Result]:
    """Ray tasks, all at once, whose results come in the order of the arguments.

    What they report comes to `on_progress`, added up. A task is tried again when its process dies;
    what one raises ends all. So does `stop`, or SIGTERM and SIGINT where it is not given, and
    raises `StopRequested`.
    """
    office = open_office(Office)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_call_reporting)
    references = [
        remote.remote(function, argument, (office, part, cpus, os.getcwd()))
        for part, argument in enumerate(arguments)
    ]
    results: dict[Any, Result] = {}
    try:
        with wish_to_stop(stop) as wish:
            while len(results) < len(references):
                under_way = [one for one in references if one not in results]
                for reference in ray.wait(under_way, timeout=POLL_S)[0]:
                    results[reference] = unwrapped(reference)
                show(office, on_progress)
                if wish.is_set():
                    raise StopRequested(
                        "stopped on request; the same command begins this part anew"
                    )
        return [results[reference] for reference in references]
    finally:
        for reference in references:
            if reference not in results:
                ray.cancel(reference, force=True)
        ray.kill(office)


def unwrapped(reference: Any) -> Any:
    """A task's result; what it raised itself, without Ray's traceback around it."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, LongtailError) else error from None


def _call(function: Callable[[Argument], Result], argument: Argument, directory: str) -> Result:
    os.chdir(directory)
    return function(argument)


def _call_reporting(
    function: Callable[[Argument, OnProgress], Result], argument: Argument, place: tuple[Any, ...]
) -> Result:
    office, part, cpus, directory = place
    os.chdir(directory)
    # Set before the task imports torch, which reads it once.
    os.environ["OMP_NUM_THREADS"] = str(cpus)
    return function(argument, lambda *news: office.report.remote(news, part))
