"""Stages in order: shards, teacher, training, evaluation, report; what is done is skipped."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import TypeVar

from pipeline.check import check_stages, needs_teacher, sources_of
from pipeline.cluster import (
    LiveEvaluation,
    run_alone,
    run_on_workers,
    run_reporting,
    run_tasks,
    start_ray,
    stop_ray,
    train_on_cluster,
)
from pipeline.data.miniature import draw_world
from pipeline.data.shards import Index, RunTasks, load_index, prepare_source, shards_url
from pipeline.errors import StopRequested
from pipeline.evaluation.checkpoints import (
    checkpoint_to_evaluate,
    detect_part,
    evaluate_waiting,
    is_evaluated,
    score_newest,
)
from pipeline.evaluation.detections import Detections, concatenate
from pipeline.evaluation.tables import format_table
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.report.page import write_report
from pipeline.semantics.contrastive import train_teacher
from pipeline.semantics.teacher import teacher_dir, trained_weights
from pipeline.signals import stop_signals
from pipeline.training.build import cache_dir
from pipeline.training.device import worker_device
from pipeline.training.manifest import newest_verified, read_manifest, waiting_for_evaluation

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Report = Callable[[int, int, str], None]
"""Told how much is done, of how much, and the newest figures."""


def run_stages(recipes: Sequence[Recipe]) -> None:
    """`longtail run`: every stage to its end; the last lines name the table and the report."""
    _in_order(recipes, _run_stage)


def prepare_stages(recipes: Sequence[Recipe]) -> None:
    """`longtail prepare`: shards, indexes and teacher of each recipe."""
    _in_order(recipes, _prepare)


def train_stages(recipes: Sequence[Recipe]) -> None:
    """`longtail train`: training alone, from what is prepared."""
    _in_order(recipes, _train)


def evaluate_stages(recipes: Sequence[Recipe], *, official: bool) -> None:
    """`longtail evaluate`: the newest checkpoint of each recipe, in mid-training too."""

    def evaluate(recipe: Recipe, stop: Event) -> None:
        print(_evaluate(recipe, stop, official=official))
        print(f"report: {write_report(recipe.run_dir)}", flush=True)

    _in_order(recipes, evaluate)


def _in_order(recipes: Sequence[Recipe], work: Callable[[Recipe, Event], None]) -> None:
    """Check all recipes, then do the work of each; SIGTERM and SIGINT raise `StopRequested` at the
    next place where nothing is lost, from the first moment on."""
    with stop_signals() as stop:
        check_stages(recipes)
        try:
            for before, recipe in zip([None, *recipes], recipes, strict=False):
                if before is not None and before.cluster != recipe.cluster:
                    stop_ray()
                _go_on(stop)
                work(recipe, stop)
        finally:
            stop_ray()


def _go_on(stop: Event) -> None:
    if stop.is_set():
        raise StopRequested("stopped on request; run the same command to go on")


def _run_stage(recipe: Recipe, stop: Event) -> None:
    started = time.monotonic()
    print(f"== {recipe.name}: {recipe.description or 'stage'}", flush=True)
    _prepare(recipe, stop)
    _train(recipe, stop)
    if recipe.data.validation is None:
        print("evaluation: none, the recipe has no validation source")
    elif is_evaluated(recipe):
        results = json.loads((recipe.run_dir / "results.json").read_text(encoding="utf-8"))
        print(f"evaluation: done already\n{format_table(results)}")
    else:
        print(_evaluate(recipe, stop, official=False))
    report = write_report(recipe.run_dir)
    print(f"report: {report} ({time.monotonic() - started:.0f} s in all)", flush=True)


def _prepare(recipe: Recipe, stop: Event) -> None:
    data = recipe.data
    if data.miniature is not None:
        draw = _tasks(recipe, stop, f"drawing the {data.miniature} world")
        draw_world(data.root, data.miniature, data.miniature_seed, draw)
    for source in sources_of(recipe):
        _go_on(stop)
        with Progress(f"shards of {source.name}", "images") as progress:
            index = prepare_source(source, data, _tasks(recipe, stop), progress.update)
        print(f"shards of {source.name}: {_describe(index)}", flush=True)
    if needs_teacher(recipe) and recipe.teacher.train is not None:
        _go_on(stop)
        _prepare_teacher(recipe, stop)


def _tasks(recipe: Recipe, stop: Event, title: str | None = None) -> RunTasks:
    """Ray tasks; Ray is not started before there is something to do."""

    def run(
        function: Callable[[Argument], Result], arguments: Sequence[Argument], /
    ) -> Iterator[tuple[int, Result]]:
        if not arguments:
            return
        start_ray(recipe.cluster)
        results = run_tasks(function, arguments, stop)
        if title is None:
            yield from results
            return
        with Progress(title, "parts") as progress:
            for done, result in enumerate(results, start=1):
                progress.update(done, len(arguments))
                yield result

    return run


def _describe(index: Index) -> str:
    """What a source holds and what was left out of it, in one line."""
    report = index.report
    dropped, unreadable = report["dropped"], report["unreadable"]
    assert isinstance(dropped, dict) and isinstance(unreadable, list)
    left_out = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
    if unreadable:
        left_out.append(f"{len(unreadable):,} unreadable images skipped ({unreadable[0][1]})")
    text = f"{index.num_samples:,} images, {len(index.category_ids):,} boxes"
    return f"{text}; {'; '.join(left_out)}" if left_out else text


def _prepare_teacher(recipe: Recipe, stop: Event) -> None:
    directory = teacher_dir(recipe.teacher, recipe.data, cache_dir(recipe))
    if trained_weights(directory) is not None:
        print(f"teacher: trained already, {directory}", flush=True)
        return
    with Progress("training the teacher", "steps") as progress:
        run_alone(_train_teacher, recipe, recipe.cluster, progress.update, stop)


def _train_teacher(recipe: Recipe, report: Report) -> None:
    assert recipe.teacher.train is not None
    directory = teacher_dir(recipe.teacher, recipe.data, cache_dir(recipe))
    captions = load_index(shards_url(recipe.data, recipe.teacher.train.captions))
    train_teacher(
        recipe.teacher,
        captions,
        directory,
        lambda step, steps, loss: report(step, steps, f"loss {loss:.3f}"),
        device=worker_device(recipe),
    )


def _train(recipe: Recipe, stop: Event) -> None:
    _go_on(stop)
    newest = newest_verified(recipe.run_dir)
    if newest is not None and read_manifest(newest).step >= recipe.training.steps:
        print(f"training: done already, {recipe.training.steps} steps", flush=True)
        if waiting_for_evaluation(recipe.run_dir):
            start_ray(recipe.cluster)
            with closing(LiveEvaluation(recipe, _evaluate_waiting)) as live:
                live.drain(stop)
        return
    with Progress(f"training {recipe.name}", "steps") as progress:
        train_on_cluster(recipe, progress.update, stop, _evaluate_waiting)


def _evaluate_waiting(recipe: Recipe) -> str | None:
    return evaluate_waiting(recipe, "cuda" if recipe.evaluation.gpus else "cpu")


def _evaluate(recipe: Recipe, stop: Event, *, official: bool) -> str:
    """Detect on all training workers, each with its part of the images, then score in one task."""
    directory = checkpoint_to_evaluate(recipe, official=official)
    number = recipe.cluster.workers
    parts = [(recipe, directory, part, number) for part in range(number)]
    started = time.monotonic()
    with Progress(f"evaluating {recipe.name}", "images") as progress:
        found = run_on_workers(_detect, parts, recipe.cluster, progress.update, stop)
    detections = concatenate(found)
    work = (recipe, directory, detections, time.monotonic() - started, official)
    return run_reporting(_score, [work], 1, 0, lambda *_: None, stop)[0]


def _detect(work: tuple[Recipe, Path, int, int], report: Report) -> Detections:
    recipe, directory, part, number = work
    return detect_part(
        recipe,
        directory,
        worker_device(recipe),
        part=part,
        num_parts=number,
        progress=lambda done, total: report(done, total, ""),
    )


def _score(work: tuple[Recipe, Path, Detections, float, bool], report: Report) -> str:
    recipe, directory, detections, seconds, official = work
    return score_newest(recipe, directory, detections, seconds, official=official)
