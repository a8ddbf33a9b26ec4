"""`longtail prepare RECIPE --soft-labels`: the stored soft labels of a recipe's sources."""

from collections.abc import Callable
from threading import Event

from pipeline.cluster import run_on_workers
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.data.stream.batches import source_readers
from pipeline.errors import RecipeError
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.semantics.stored import Header, read_header
from pipeline.semantics.storing import finish, missing_shards, shard_images, store_shard
from pipeline.training.build import build_teacher, labelled_sources, labels_folder
from pipeline.training.device import worker_device

Report = Callable[[int, int, str], None]


def store_soft_labels(recipe: Recipe, stop: Event) -> None:
    """Soft labels of all boxes of the sources that the branch learns from, beside their shards.

    The work is shared among what training workers hold, each shard's file is written at once, and
    those that are there are not made again. Raises `RecipeError` where no labels are learnt.
    """
    semantic = recipe.semantic
    if semantic is None or not recipe.uses_soft_labels or semantic.objective != "logits":
        raise RecipeError(
            f"recipe {recipe.name} learns no soft labels, so there are none to store; give it a "
            "semantic section with labels soft and objective logits, or leave out --soft-labels"
        )
    vocabulary = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).vocabulary
    for name, index in labelled_sources(recipe).items():
        folder, identity = labels_folder(recipe, vocabulary, index)
        header = read_header(folder)
        if header is None:
            missing, number = missing_shards(index, folder), recipe.cluster.max_workers
            parts = [(recipe, name, folder, missing[part::number]) for part in range(number)]
            with Progress(f"soft labels of {name}", "images") as progress:
                found = run_on_workers(_store_part, parts, recipe.cluster, progress.update, stop)
            header = finish(index, folder, identity, found[0])
        print(_describe(name, header, folder), flush=True)


def _store_part(work: tuple[Recipe, str, str, list[int]], report: Report) -> float:
    """The labels of some shards, as far as they are missing; the teacher's temperature."""
    recipe, name, folder, shards = work
    vocabulary = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).vocabulary
    [source] = [s for s in (*recipe.data.train, *recipe.data.extra) if s.name == name]
    index = load_index(shards_url(recipe.data, source))
    device = worker_device(recipe)
    teacher = build_teacher(recipe, vocabulary, device)
    reader = source_readers([source], {name: index}, vocabulary, recipe.data.root)[name]
    # A task that is tried again has made some of them.
    shards = sorted({*shards} & {*missing_shards(index, folder)})
    total, done = shard_images(index, shards), 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        report(done, total, "")

    for shard in shards:
        store_shard(
            reader,
            teacher,
            recipe.data.transforms,
            shard,
            folder,
            recipe.teacher.top_k,
            device,
            count,
        )
    return teacher.temperature


def _describe(name: str, header: Header, folder: str) -> str:
    kept = header.identity["top_k"]
    exact = kept is None or kept >= header.num_categories
    how = "exact" if exact else f"the {kept} largest of {header.num_categories}, with "
    if not exact:
        mean, most = header.rest
        how += f"{mean:.2%} of a label's mass spread evenly ({most:.2%} at most)"
    skipped = f"; {header.skipped:,} images could not be read" if header.skipped else ""
    return (
        f"soft labels of {name}: {header.num_boxes:,} boxes of {header.num_images:,} images, "
        f"{how}, {header.num_bytes / 1e6:.1f} MB in {folder}{skipped}"
    )
