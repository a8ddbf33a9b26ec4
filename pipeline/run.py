"""Stages in order: shards, teacher, training, evaluation, report; what is done is skipped."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event

from pipeline.check import check_prepared, check_stages, needs_teacher
from pipeline.cluster import (
    LiveEvaluation,
    run_alone,
    run_on_workers,
    run_reporting,
    start_ray,
    stop_ray,
    train_on_cluster,
)
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.evaluation.checkpoints import (
    checkpoint_to_evaluate,
    detect_part,
    evaluate_waiting,
    is_evaluated,
    score_newest,
)
from pipeline.evaluation.detections import Detections, concatenate
from pipeline.evaluation.tables import format_table
from pipeline.preparation import go_on, is_prepared, prepare_sources
from pipeline.progress import Progress
from pipeline.recipe import Recipe, Source
from pipeline.report.page import write_report
from pipeline.semantics.clip import model_config
from pipeline.semantics.contrastive import train_teacher
from pipeline.semantics.teacher import teacher_dir, trained_weights
from pipeline.semantics.text import cached_text, templates, text_embeddings
from pipeline.semantics.towers.choice import describe_regions
from pipeline.signals import stop_signals
from pipeline.store_labels import store_soft_labels
from pipeline.training.build import cache_dir, teacher_weights
from pipeline.training.device import worker_device
from pipeline.training.manifest import newest_verified, read_manifest, waiting_for_evaluation

Report = Callable[[int, int, str], None]
"""Told how much is done, of how much, and the newest figures."""
_FEW_PROMPTS = 5000
"""So many each training worker makes for itself, sooner than a process begins to."""


def run_stages(recipes: Sequence[Recipe]) -> None:
    """`longtail run`: every stage to its end; the last lines name the table and the report."""
    _in_order(recipes, _run_stage)


def prepare_stages(recipes: Sequence[Recipe], *, soft_labels: bool = False) -> None:
    """`longtail prepare`: shards, indexes and teacher of each recipe, and stored `soft_labels`."""
    _in_order(recipes, partial(_prepare, soft_labels=soft_labels))


def prepare_teacher(recipe: Recipe, sources: Sequence[Source]) -> None:
    """What studies of a recipe's teacher read: shards of `sources` that are not there yet, and the
    teacher where the recipe trains one. Nothing else of the stage is checked or prepared."""
    with stop_signals() as stop:
        try:
            training = recipe.teacher.train
            needed = [*sources, training.captions] if training is not None else [*sources]
            prepare_sources(recipe, stop, [one for one in needed if not is_prepared(recipe, one)])
            if training is not None:
                _prepare_teacher(recipe, stop)
        finally:
            stop_ray()


def train_stages(recipes: Sequence[Recipe]) -> None:
    """`longtail train`: training alone, from what is prepared."""
    _in_order(recipes, _train)


def evaluate_stages(
    recipes: Sequence[Recipe], *, official: bool, checkpoint: Path | None = None
) -> None:
    """`longtail evaluate`: the newest checkpoint of each recipe, in mid-training too, or one
    `checkpoint` with all of them."""

    def evaluate(recipe: Recipe, stop: Event) -> None:
        print(_evaluate(recipe, stop, official=official, checkpoint=checkpoint))
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
                go_on(stop)
                work(recipe, stop)
        finally:
            stop_ray()


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


def _prepare(recipe: Recipe, stop: Event, *, soft_labels: bool = False) -> None:
    prepare_sources(recipe, stop)
    check_prepared(recipe)
    if needs_teacher(recipe) and recipe.teacher.train is not None:
        go_on(stop)
        _prepare_teacher(recipe, stop)
    if needs_teacher(recipe) and recipe.teacher.text_embeddings is None:
        go_on(stop)
        _prepare_text(recipe, stop)
    if recipe.uses_soft_labels:
        regions = describe_regions(recipe.teacher, model_config(recipe.teacher.model))
        print(f"teacher: {recipe.teacher.model}, {regions}", flush=True)
    if soft_labels or (recipe.uses_soft_labels and recipe.teacher.stored):
        go_on(stop)
        store_soft_labels(recipe, stop)


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


def _prepare_text(recipe: Recipe, stop: Event) -> None:
    """The text embeddings, once for all training workers where they take long.

    LVIS with the ensemble of prompts is 97,000 texts, most of an hour of one CPU with RN50.
    """
    names, weights = _names(recipe), teacher_weights(recipe)
    few = len(names) * len(templates(recipe.teacher.prompts)) <= _FEW_PROMPTS
    if few or cached_text(recipe.teacher, names, weights, cache_dir(recipe)).is_file():
        return
    with Progress("text embeddings", "prompts") as progress:
        run_alone(_embed_names, recipe, recipe.cluster, progress.update, stop)


def _embed_names(recipe: Recipe, report: Report) -> None:
    text_embeddings(
        recipe.teacher,
        _names(recipe),
        teacher_weights(recipe),
        cache_dir(recipe),
        device=worker_device(recipe),
        progress=lambda done, total: report(done, total, ""),
    )


def _names(recipe: Recipe) -> list[str]:
    return load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).vocabulary.names


def _train(recipe: Recipe, stop: Event) -> None:
    go_on(stop)
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


def _evaluate(
    recipe: Recipe, stop: Event, *, official: bool, checkpoint: Path | None = None
) -> str:
    """Detect on all training workers, each with its part of the images, then score in one task."""
    directory = checkpoint_to_evaluate(recipe, official=official, checkpoint=checkpoint)
    number = recipe.cluster.max_workers
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
