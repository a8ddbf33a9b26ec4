"""Training workers under Ray Train, restarted from their newest checkpoint."""

import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayError

from pipeline import errors
from pipeline.cluster.connection import start_ray
from pipeline.cluster.group import TrainingOffice, beating, wait_for_end
from pipeline.cluster.live import LiveEvaluation
from pipeline.cluster.office import (
    POLL_S,
    OfficeHandler,
    OnProgress,
    open_office,
    show,
    wish_to_stop,
)
from pipeline.cluster.teacher_actor import recipe_actors
from pipeline.cluster.watch import NEVER_S, Watch, rendezvous_timeout_s
from pipeline.errors import ClusterError, LongtailError, MemoryExceeded, StopRequested
from pipeline.recipe import Recipe
from pipeline.training.manifest import newest_verified, refuse_another_recipe
from pipeline.training.out_of_memory import memory_advice
from pipeline.training.whereabouts import here


def train_on_cluster(
    recipe: Recipe,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
    evaluate: Callable[[Recipe], str | None] | None = None,
) -> None:
    """Train a stage on Ray workers, from its newest checkpoint, through failures of workers.

    The actors of its pool of teachers, if the recipe has one, live as long as this call.
    `evaluate` is run as a Ray task, beside the training, for each checkpoint that waits for its
    evaluation; the text that it returns is logged. `stop`, or SIGTERM and SIGINT where it is not
    given, makes all workers save a checkpoint; then `StopRequested` is raised. What a worker raises
    as a `LongtailError` is raised here as the same class. `ClusterError` says that workers were
    lost too often, or places for them waited for in vain. Raises `RecipeError` before anything is
    started where the run belongs to another recipe.
    """
    newest = newest_verified(recipe.run_dir)
    if newest is not None:
        refuse_another_recipe(newest, recipe)
    start_ray(recipe.cluster)
    office = open_office(TrainingOffice)
    teachers = recipe_actors(recipe)
    storage = tempfile.mkdtemp(prefix="longtail_ray_train_")
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            _make_trainer(recipe, office, teachers, storage).fit()
        except Exception as error:  # raised again in the main thread
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="ray train")
    try:
        with wish_to_stop(stop) as wish, closing(LiveEvaluation(recipe, evaluate)) as live:
            thread.start()
            watch = Watch(office, recipe.cluster.hang_timeout)
            asked = evaluates = False
            while thread.is_alive():
                thread.join(POLL_S)
                if wish.is_set() and not asked:
                    asked = True
                    office.stop.remote()
                if asked and not ray.get(office.is_there.remote()):
                    raise StopRequested(
                        "stopped while there were no workers; the same command goes on from the "
                        "newest checkpoint"
                    )
                show(office, on_progress)
                if live.poll() != evaluates:
                    evaluates = not evaluates
                    office.evaluates.remote(evaluates)
                watch.look()
            if not failure:
                live.drain(wish)
        show(office, on_progress)
        error = ray.get(office.error.remote())
        if error is not None:
            name, message = error
            raise getattr(errors, name)(message)
        if failure:
            raise failure[0]
    except OutOfMemoryError as error:
        what = "Ray ended a process of the run, for the memory of its machine was used up"
        raise MemoryExceeded(memory_advice(recipe, what)) from error
    except RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ClusterError(
            f"Ray failed under the run: {reason}. The same command goes on from the newest "
            "checkpoint"
        ) from error
    finally:
        for actor in (office, *teachers):
            ray.kill(actor)
        shutil.rmtree(storage, ignore_errors=True)


def _make_trainer(recipe: Recipe, office: Any, teachers: list[Any], storage: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import LoggingConfig

    from pipeline.cluster.controller import Supervisor
    from pipeline.cluster.elastic import GROW_S, Trainer

    section = recipe.cluster
    resources = {"CPU": section.cpus_per_worker}
    if section.gpus_per_worker:
        resources["GPU"] = section.gpus_per_worker
    return Trainer(
        _work,
        train_loop_config={
            "recipe": recipe.model_dump_json(),
            "office": office,
            "teachers": teachers,
            "directory": os.getcwd(),
        },
        scaling_config=ScalingConfig(
            num_workers=(
                (section.min_workers, section.max_workers)
                if section.is_elastic
                else section.max_workers
            ),
            elastic_resize_monitor_interval_s=GROW_S,
            use_gpu=section.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(
            backend="nccl" if section.gpus_per_worker else "gloo",
            timeout_s=rendezvous_timeout_s(section),
        ),
        run_config=RunConfig(
            name=f"{recipe.name}-{secrets.token_hex(4)}",
            storage_path=storage,
            # Starts that found no places are not counted: the supervisor's patience ends them.
            failure_config=FailureConfig(max_failures=section.max_failures),
            callbacks=[Supervisor(office, recipe, recipe.run_dir.absolute())],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What each training worker runs."""
    office, recipe = config["office"], Recipe.model_validate_json(config["recipe"])
    if ray.get(office.error.remote()) is not None:
        return  # A restart after an error that would only come again.
    os.chdir(config["directory"])
    rank, group = ray.train.get_context().get_world_rank(), ray.get(office.group.remote())
    try:
        with beating(office, group, rank, recipe.cluster.hang_timeout):
            _train(recipe, rank, office, config["teachers"])
        ray.get(office.leave.remote(group, rank))
    except StopRequested as request:
        if ray.get(office.leave.remote(group, rank)):
            wait_for_end(office)
        ray.get(office.fail.remote(type(request).__name__, str(request)))
    except LongtailError as error:
        ray.get(office.fail.remote(type(error).__name__, str(error)))
        raise


def _train(recipe: Recipe, rank: int, office: Any, teachers: list[Any]) -> None:
    here.enter("importing", 0)
    import torch

    here.move()
    from pipeline.training.device import worker_device
    from pipeline.training.loop import train

    torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    first = rank == 0
    if first:
        logging.getLogger("pipeline").addHandler(OfficeHandler(office))
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
        try:
            return any(ray.get(ready))
        except ActorUnavailableError:  # The next answers say the same.
            return False

    pool = None
    if teachers:
        from pipeline.cluster.teacher_pool import TeacherPool

        pool = TeacherPool(teachers, recipe.teacher.batches_ahead, rank)
    here.enter("joining the other ranks", waits=True)
    patience = timedelta(seconds=NEVER_S)
    train(recipe, worker_device(recipe), check_in, soft_labels=pool, patience=patience)
