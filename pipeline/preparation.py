"""Shards and indexes: of the sources of a recipe, or of one data set without a recipe."""

from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import TypeVar

from pipeline.check import check_validation, detector_vocabulary, sources_of
from pipeline.cluster import run_tasks, start_ray, stop_ray
from pipeline.data.miniature.world import draw_world
from pipeline.data.shards.index import HEADER_FILE, load_index
from pipeline.data.shards.preparing import RunTasks, prepare_source, shards_url
from pipeline.data.shards.report import describe_preparation
from pipeline.data.storage.files import exists
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import StopRequested
from pipeline.progress import Progress
from pipeline.recipe import Cluster, Recipe, Source
from pipeline.recipe.data import Shards
from pipeline.signals import stop_signals

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def prepare_sources(recipe: Recipe, stop: Event, sources: Sequence[Source] | None = None) -> None:
    """Shards of every source of a recipe, or of some `sources`, its miniature world drawn first
    where it asks for one. Raises `RecipeError` when, with every source there, the categories of the
    validation source turn out not to be the detector's."""
    data, is_whole = recipe.data, sources is None
    sources = sources_of(recipe) if sources is None else sources
    if data.miniature is not None and sources:
        _draw_world(recipe, stop)
    for source in sources:
        go_on(stop)
        if data.validation is not None and source.name == data.validation.name:
            _prepare_validation(recipe, source, stop)
        else:
            _prepare(source, data, recipe.cluster, stop, data.store_short_side)
    if is_whole and data.validation is not None:
        detector = load_index(shards_url(data, data.vocabulary_source)).vocabulary
        check_validation(recipe, load_index(shards_url(data, data.validation)), detector)


def is_prepared(recipe: Recipe, source: Source) -> bool:
    """Whether a source of the recipe has an index; whether it is still what it was made from is
    not asked, so that shards alone suffice."""
    return exists(f"{shards_url(recipe.data, source)}/{HEADER_FILE}")


def prepare_dataset(source: Source, data: Shards, cluster: Cluster) -> None:
    """Shards of one data set; SIGTERM and SIGINT raise `StopRequested` between two of them."""
    with stop_signals() as stop:
        try:
            _prepare(source, data, cluster, stop, data.store_short_side)
        finally:
            stop_ray()


def go_on(stop: Event) -> None:
    """Raises `StopRequested` when that was asked for."""
    if stop.is_set():
        raise StopRequested("stopped on request; run the same command to go on")


def _prepare_validation(recipe: Recipe, source: Source, stop: Event) -> None:
    """Shards of the source that is evaluated on, images as published, and its ground truth; in the
    detector's categories, where its own names are free."""
    given = None
    if source.format == "visual_genome" and source != recipe.data.vocabulary_source:
        given = detector_vocabulary(recipe)
    _prepare(source, recipe.data, recipe.cluster, stop, None, evaluated=True, vocabulary=given)


def _prepare(
    source: Source,
    data: Shards,
    cluster: Cluster,
    stop: Event,
    short_side: int | None,
    *,
    evaluated: bool = False,
    vocabulary: Vocabulary | None = None,
) -> None:
    with Progress(f"shards of {source.name}", "images") as progress:
        index = prepare_source(
            source,
            data,
            _tasks(cluster, stop),
            progress.update,
            short_side=short_side,
            evaluated=evaluated,
            vocabulary=vocabulary,
        )
    print(describe_preparation(index), flush=True)


def _draw_world(recipe: Recipe, stop: Event) -> None:
    data = recipe.data
    assert data.miniature is not None
    run, done = _tasks(recipe.cluster, stop), 0
    with Progress(f"drawing the {data.miniature} world", "parts") as progress:

        def draw(
            function: Callable[[Argument], Result], arguments: Sequence[Argument], /
        ) -> Iterator[tuple[int, Result]]:
            nonlocal done
            for result in run(function, arguments):
                done += 1
                # How many parts follow these is known when the last is drawn.
                progress.update(done, done + 1)
                yield result

        draw_world(data.root, data.miniature, data.miniature_seed, draw)
        if done:
            progress.update(done, done)


def _tasks(cluster: Cluster, stop: Event) -> RunTasks:
    """Ray tasks; Ray is not started before there is something to do."""

    def run(
        function: Callable[[Argument], Result], arguments: Sequence[Argument], /
    ) -> Iterator[tuple[int, Result]]:
        if not arguments:
            return
        start_ray(cluster)
        yield from run_tasks(function, arguments, stop)

    return run
