"""Evaluations beside the training, for the checkpoints that wait for theirs."""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.cluster.office import POLL_S
from pipeline.cluster.tasks import unwrapped
from pipeline.errors import LongtailError, StopRequested
from pipeline.recipe import Recipe
from pipeline.training.manifest import evaluation_done, waiting_for_evaluation

logger = logging.getLogger(__name__)

MOST_SPARE_THREADS = 8
"""Threads of a live evaluation that reserves no CPUs, where trainers leave so many unused."""


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
        spare = resources.get("CPU", 0) - cluster.max_workers * cluster.cpus_per_worker
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
            text = unwrapped(task)
        except (LongtailError, RayError) as error:
            self._failures[self._subject] += 1
            if self._failures[self._subject] >= self.ATTEMPTS:
                self._give_up(self._subject, error)
            else:
                name = self._subject.name
                logger.warning("evaluation of %s failed, trying again: %s", name, error)
        else:
            logger.info("%s", text)


def _call_quietly(
    evaluate: Callable[[Recipe], str | None], recipe: Recipe, place: tuple[int, str]
) -> str | None:
    threads, directory = place
    os.chdir(directory)
    # Set before the task imports torch, which reads it once.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return evaluate(recipe)
