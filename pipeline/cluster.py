"""Ray: tasks, training workers, and what happens when a process dies or is asked to stop.

Our own checkpoints in the run directory are the only state that outlives a failure. Ray restarts
workers; each time they start from the newest checkpoint that verifies. This module does not import
torch: the driver stays small.
"""

import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from pipeline import errors
from pipeline.errors import LongtailError, StopRequested
from pipeline.recipe import Cluster, Recipe
from pipeline.signals import signals_kept, stop_signals
from pipeline.training.manifest import (
    evaluation_done,
    newest_verified,
    refuse_another_recipe,
    waiting_for_evaluation,
)

# Ray reads these when it is imported or started; what the user has set stays.
os.environ.update(
    {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # A process of 115 MB that warns of lost nodes in a way that nothing here asks for.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
        **os.environ,
    }
)

import ray
from ray.exceptions import RayError, RayTaskError

logger = logging.getLogger(__name__)

Argument = TypeVar("Argument")
Result = TypeVar("Result")
OnProgress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a note with the newest figures."""
News = tuple[int, int, str]
"""What `OnProgress` is called with."""

PROCESS_GROUP_TIMEOUT_S = 600
MOST_SPARE_THREADS = 8
"""Threads of a live evaluation that reserves no CPUs, where trainers leave so many unused."""
POLL_S = 0.5


def start_ray(section: Cluster) -> None:
    """Connect to the cluster of the recipe, or start one on this machine's loopback address.

    Does nothing when this process has one. Ray asks every caller for a token; a new one is passed
    on by environment, which other users cannot read.
    """
    if ray.is_initialized():
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if section.address is not None:
        with signals_kept():
            ray.init(address=section.address, **common)
        return
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    workers = section.workers * section.cpus_per_worker
    with signals_kept():
        ray.init(
            num_cpus=max(os.cpu_count() or 1, -int(-workers // 1)),
            object_store_memory=section.object_store_megabytes * 2**20,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            **common,
        )


def run_tasks(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    stop: threading.Event | None = None,
) -> Iterator[tuple[int, Result]]:
    """`function(argument)` of each argument as Ray tasks; yields (position, result) as they end.

    A few more tasks than CPUs are under way at a time. A task whose worker dies is tried again;
    what a task raises is raised here. `stop`, or SIGTERM and SIGINT where it is not given, raises
    `StopRequested` between results.
    """
    remote = ray.remote(max_retries=3)(_call)
    limit = 2 * int(ray.cluster_resources().get("CPU", 1))
    waiting = deque(enumerate(arguments))
    under_way: dict[Any, int] = {}
    shared = ray.put(function)
    with _wish(stop) as wish:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < limit:
                    position, argument = waiting.popleft()
                    under_way[remote.remote(shared, argument, os.getcwd())] = position
                ready, _ = ray.wait(list(under_way), timeout=POLL_S)
                if wish.is_set():
                    raise StopRequested("stopped on request; finished parts are kept")
                for reference in ready:
                    position = under_way.pop(reference)
                    yield position, _unwrapped(reference)
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
    cpus = max(1, int(min(section.workers * section.cpus_per_worker, largest)))
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
    office = ray.remote(num_cpus=0)(_Office).remote()
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_call_reporting)
    references = [
        remote.remote(function, argument, (office, part, cpus, os.getcwd()))
        for part, argument in enumerate(arguments)
    ]
    results: dict[Any, Result] = {}
    try:
        with _wish(stop) as wish:
            while len(results) < len(references):
                under_way = [one for one in references if one not in results]
                for reference in ray.wait(under_way, timeout=POLL_S)[0]:
                    results[reference] = _unwrapped(reference)
                _show(office, on_progress)
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


def stop_ray() -> None:
    """Leave the cluster, and end the one that `start_ray` started; does nothing without one."""
    if ray.is_initialized():
        ray.shutdown()


def train_on_cluster(
    recipe: Recipe,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
    evaluate: Callable[[Recipe], str | None] | None = None,
) -> None:
    """Train a stage on Ray workers, from its newest checkpoint, through failures of workers.

    `evaluate` is run as a Ray task, beside the training, for each checkpoint that waits for its
    evaluation; the text that it returns is logged. `stop`, or SIGTERM and SIGINT where it is not
    given, makes all workers save a checkpoint; then `StopRequested` is raised. What a worker raises
    as a `LongtailError` is raised here as the same class. Raises `RecipeError` before anything is
    started where the run belongs to another recipe.
    """
    newest = newest_verified(recipe.run_dir)
    if newest is not None:
        refuse_another_recipe(newest, recipe)
    start_ray(recipe.cluster)
    office = ray.remote(num_cpus=0)(_Office).remote()
    storage = tempfile.mkdtemp(prefix="longtail_ray_train_")
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            _make_trainer(recipe, office, storage).fit()
        except Exception as error:  # raised again in the main thread
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="ray train")
    try:
        with _wish(stop) as wish, closing(LiveEvaluation(recipe, evaluate)) as live:
            thread.start()
            asked = False
            while thread.is_alive():
                thread.join(POLL_S)
                if wish.is_set() and not asked:
                    asked = True
                    office.stop.remote()
                _show(office, on_progress)
                live.poll()
            if not failure:
                live.drain(wish)
        _show(office, on_progress)
        error = ray.get(office.error.remote())
        if error is not None:
            name, message = error
            raise getattr(errors, name)(message)
        if failure:
            raise failure[0]
    finally:
        ray.kill(office)
        shutil.rmtree(storage, ignore_errors=True)


class LiveEvaluation:
    """One Ray task at a time for the checkpoints of a run that wait for their evaluation.

    A checkpoint keeps waiting until its evaluation is done, so one that is lost, with its task or
    with the driver, is begun again; after `ATTEMPTS` failures it is given up with a warning. So is
    the oldest when more than `MOST_WAITING` wait, and any that the cluster has no place for.
    """

    ATTEMPTS = 3
    MOST_WAITING = 3

    def __init__(self, recipe: Recipe, evaluate: Callable[[Recipe], str | None] | None) -> None:
        self._recipe, self._evaluate = recipe, evaluate
        self._task: Any = None
        self._subject: Path | None = None
        self._failures: Counter[Path] = Counter()

    def poll(self) -> bool:
        """Take what is finished, begin what waits; whether anything is under way."""
        if self._evaluate is None:
            return False
        if self._task is not None and ray.wait([self._task], timeout=0)[0]:
            self._finish()
        waiting = waiting_for_evaluation(self._recipe.run_dir)
        while len(waiting) > self.MOST_WAITING:
            oldest = waiting.pop(0 if self._task is None or waiting[0] != self._subject else 1)
            self._give_up(oldest, "training is faster than its evaluations")
        if self._task is None and waiting:
            self._begin(waiting[0])
        return self._task is not None

    def _begin(self, directory: Path) -> None:
        section, resources = self._recipe.evaluation, ray.cluster_resources()
        for resource, needed in (("CPU", section.cpus), ("GPU", section.gpus)):
            if needed > resources.get(resource, 0):
                self._give_up(
                    directory,
                    f"evaluation.{resource.lower()}s is {needed:g} and the cluster has "
                    f"{resources.get(resource, 0):g}",
                )
                return
        remote = ray.remote(num_cpus=section.cpus, num_gpus=section.gpus, max_retries=0)(
            _call_quietly
        )
        cluster = self._recipe.cluster
        spare = resources.get("CPU", 0) - cluster.workers * cluster.cpus_per_worker
        threads = max(1, int(section.cpus or min(spare, MOST_SPARE_THREADS)))
        self._subject = directory
        self._task = remote.remote(self._evaluate, self._recipe, (threads, os.getcwd()))

    def _give_up(self, directory: Path, reason: object) -> None:
        evaluation_done(directory)
        logger.warning(
            "evaluation of %s is given up, training goes on without it: %s", directory.name, reason
        )

    def drain(self, stop: threading.Event) -> None:
        """Poll until nothing waits any longer; `stop` raises `StopRequested` before."""
        while self.poll():
            if stop.wait(POLL_S):
                raise StopRequested(
                    "stopped with training done and evaluations under way; the same command goes on"
                )

    def close(self) -> None:
        """End what is under way; its checkpoint waits for the next run of the command."""
        if self._task is not None:
            ray.cancel(self._task, force=True)

    def _finish(self) -> None:
        task, self._task = self._task, None
        assert self._subject is not None
        try:
            text = _unwrapped(task)
        except (LongtailError, RayError) as error:
            self._failures[self._subject] += 1
            if self._failures[self._subject] >= self.ATTEMPTS:
                self._give_up(self._subject, error)
            else:
                name = self._subject.name
                logger.warning("evaluation of %s failed, trying again: %s", name, error)
        else:
            logger.info("%s", text)


def _wish(stop: threading.Event | None) -> AbstractContextManager[threading.Event]:
    return stop_signals() if stop is None else nullcontext(stop)


class _Office:
    """An actor between driver and workers: a wish to stop goes in, progress and errors come out.

    Only plain values pass through it, so it survives whatever the workers go through.
    """

    def __init__(self) -> None:
        self._stop = False
        self._error: tuple[str, str] | None = None
        self._progress: dict[int, News] = {}
        self._messages: list[tuple[int, str]] = []

    def stop(self) -> None:
        self._stop = True

    def report(self, news: News, part: int = 0) -> bool:
        """Take the progress of one of several parts; whether the reporter should stop."""
        self._progress[part] = news
        return self._stop

    def log(self, level: int, message: str) -> None:
        self._messages.append((level, message))

    def fail(self, name: str, message: str) -> None:
        """Keep the first error of a worker."""
        self._error = self._error or (name, message)

    def error(self) -> tuple[str, str] | None:
        return self._error

    def news(self) -> tuple[News | None, list[tuple[int, str]]]:
        """Progress of all parts together, and the messages since the last call."""
        messages, self._messages = self._messages, []
        if not self._progress:
            return None, messages
        done, totals, notes = zip(*self._progress.values(), strict=True)
        return (sum(done), sum(totals), notes[-1]), messages


class _OfficeHandler(logging.Handler):
    """Sends a worker's log records to the driver."""

    def __init__(self, office: Any) -> None:
        super().__init__(logging.INFO)
        self._office = office

    def emit(self, record: logging.LogRecord) -> None:
        self._office.log.remote(record.levelno, record.getMessage())


def _make_trainer(recipe: Recipe, office: Any, storage: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    section = recipe.cluster
    resources = {"CPU": section.cpus_per_worker}
    if section.gpus_per_worker:
        resources["GPU"] = section.gpus_per_worker
    return TorchTrainer(
        _work,
        train_loop_config={
            "recipe": recipe.model_dump_json(),
            "office": office,
            "directory": os.getcwd(),
        },
        scaling_config=ScalingConfig(
            num_workers=section.workers,
            use_gpu=section.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(
            backend="nccl" if section.gpus_per_worker else "gloo",
            timeout_s=PROCESS_GROUP_TIMEOUT_S,
        ),
        run_config=RunConfig(
            name=f"{recipe.name}-{secrets.token_hex(4)}",
            storage_path=storage,
            failure_config=FailureConfig(
                max_failures=section.max_failures, controller_failure_limit=1
            ),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What each training worker runs."""
    import torch

    from pipeline.training.device import worker_device
    from pipeline.training.loop import train

    office, recipe = config["office"], Recipe.model_validate_json(config["recipe"])
    if ray.get(office.error.remote()) is not None:
        return  # A restart after an error that would only come again.
    os.chdir(config["directory"])
    torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    first = ray.train.get_context().get_world_rank() == 0
    if first:
        logging.getLogger("pipeline").addHandler(_OfficeHandler(office))
        logging.getLogger("pipeline").setLevel(logging.INFO)
    answers: deque[Any] = deque()

    def check_in(step: int, loss: float | None) -> bool:
        if not first:
            return False
        note = "" if loss is None else f"loss {loss:.4g}"
        answers.append(office.report.remote((step, recipe.training.steps, note)))
        ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=0)
        for reference in ready:
            answers.remove(reference)
        return any(ray.get(ready))

    try:
        train(recipe, worker_device(recipe), check_in)
    except LongtailError as error:
        ray.get(office.fail.remote(type(error).__name__, str(error)))
        if not isinstance(error, StopRequested):
            raise


def _show(office: Any, on_progress: OnProgress | None) -> None:
    progress, messages = ray.get(office.news.remote())
    for level, message in messages:
        logger.log(level, "%s", message)
    if progress is not None and on_progress is not None:
        on_progress(*progress)


def _call(function: Callable[[Argument], Result], argument: Argument, directory: str) -> Result:
    os.chdir(directory)
    return function(argument)


def _call_quietly(
    function: Callable[[Argument], Result], argument: Argument, place: tuple[int, str]
) -> Result:
    threads, directory = place
    os.chdir(directory)
    # Set before the task imports torch, which reads it once.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return function(argument)


def _call_reporting(
    function: Callable[[Argument, OnProgress], Result], argument: Argument, place: tuple[Any, ...]
) -> Result:
    office, part, cpus, directory = place
    os.chdir(directory)
    # Set before the task imports torch, which reads it once.
    os.environ["OMP_NUM_THREADS"] = str(cpus)
    return function(argument, lambda *news: office.report.remote(news, part))


def _unwrapped(reference: Any) -> Any:
    """A task's result; what it raised itself, without Ray's traceback around it."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, LongtailError) else error from None
