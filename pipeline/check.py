"""Refuse what cannot work before anything is spent, and say what a stage is going to do."""

import os
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pipeline.data.shards import Index, load_index, shards_url
from pipeline.data.sources import list_records
from pipeline.data.storage import exists, resolve
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Recipe, Source
from pipeline.recipe_file import recipe_from_tree
from pipeline.training.checkpoint import find_source
from pipeline.training.manifest import newest_verified, read_manifest, refuse_another_recipe


def check_stages(recipes: Sequence[Recipe]) -> str:
    """Check recipes that will run in this order; what they are going to do, as text.

    Raises the first `LongtailError` found. Nothing is written and no cluster is started.
    """
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"two recipes have the name {twice[0]!r}; a run directory belongs to one")
    earlier: dict[str, Recipe] = {}
    texts = []
    for recipe in recipes:
        texts.append(_check_stage(recipe, earlier))
        earlier[recipe.name] = recipe
    return "\n".join(texts)


def sources_of(recipe: Recipe) -> list[Source]:
    """Every source that the stage prepares, those captions included that its teacher trains on."""
    found = list(recipe.data.sources)
    if recipe.teacher.train and needs_teacher(recipe):
        captions = recipe.teacher.train.captions
        same = [source for source in found if source.name == captions.name]
        if not same:
            found.append(captions)
        elif (same[0].format, same[0].images, same[0].annotations) != (
            captions.format,
            captions.images,
            captions.annotations,
        ):
            raise RecipeError(
                f"teacher.train.captions and a source of data are both named {captions.name!r} but "
                "are not the same data; give one of them another name"
            )
    return found


def needs_teacher(recipe: Recipe) -> bool:
    """Whether the stage needs CLIP: for the text rows of the class head, or for soft labels."""
    return recipe.semantic is not None or recipe.detector.class_head.kind == "language"


def _check_stage(recipe: Recipe, earlier: dict[str, Recipe]) -> str:
    _check_devices(recipe)
    _check_logging(recipe)
    _check_teacher(recipe)
    _check_backbone(recipe)
    indexes = {source.name: _find_data(recipe, source) for source in sources_of(recipe)}
    vocabulary = _vocabulary(recipe, indexes)
    _check_validation(recipe, indexes, vocabulary)
    _check_beginning(recipe, earlier, vocabulary)
    return "\n".join(_describe(recipe, indexes, vocabulary))


def _check_devices(recipe: Recipe) -> None:
    cluster, evaluation = recipe.cluster, recipe.evaluation
    if cluster.address is not None:
        return
    trainers = cluster.workers * cluster.cpus_per_worker
    spare = max(os.cpu_count() or 1, trainers) - trainers
    if evaluation.cpus > spare:
        raise RecipeError(
            f"recipe {recipe.name}: evaluation.cpus is {evaluation.cpus:g}, and the trainers leave "
            f"{spare:g} of this machine's; 0 shares those of the trainers"
        )
    if not cluster.gpus_per_worker and not evaluation.gpus:
        return
    import torch

    needed = cluster.gpus_per_worker * cluster.workers + evaluation.gpus
    if evaluation.gpus and needed > torch.cuda.device_count():
        raise RecipeError(
            f"recipe {recipe.name}: evaluation.gpus {evaluation.gpus:g} and the trainers' GPUs are "
            f"{needed:g}, and this machine has {torch.cuda.device_count()}; give the trainers "
            "less, or set evaluation.gpus to 0 to evaluate on the CPU while training"
        )
    if not torch.cuda.is_available():
        raise RecipeError(
            f"recipe {recipe.name}: cluster.gpus_per_worker is {cluster.gpus_per_worker:g}, and "
            "this machine has no GPU that torch can use; set cluster.gpus_per_worker=0 to train on "
            "the CPU, or cluster.address to a Ray cluster that has GPUs"
        )
    needed = cluster.gpus_per_worker * cluster.workers
    if needed > torch.cuda.device_count():
        raise RecipeError(
            f"recipe {recipe.name}: {cluster.workers} workers of {cluster.gpus_per_worker:g} GPUs "
            f"need {needed:g}, and this machine has {torch.cuda.device_count()}"
        )


def _check_logging(recipe: Recipe) -> None:
    for package in ("wandb", "trackio"):
        if getattr(recipe.logging, package) is not None and find_spec(package) is None:
            raise RecipeError(
                f"recipe {recipe.name}: logging.{package} is set, and {package} is not installed; "
                f"`pip install {package}`, or set logging.{package} to null"
            )


def _check_teacher(recipe: Recipe) -> None:
    if not needs_teacher(recipe):
        return
    from pipeline.semantics.clip import model_config, weights_identity

    model_config(recipe.teacher.model)
    if recipe.teacher.train is None:
        weights_identity(recipe.teacher, None)


def _check_backbone(recipe: Recipe) -> None:
    import torch

    from pipeline.detectors.backbone import Backbone

    with torch.device("meta"):
        Backbone(recipe.detector.backbone, pretrained=False)
    weights = recipe.detector.backbone.weights
    if weights not in (None, "pretrained") and not Path(weights).is_file():
        raise RecipeError(
            f"recipe {recipe.name}: detector.backbone.weights {weights!r} is no file; give a local "
            "weights file, `pretrained` for timm's own, or null for random ones"
        )


def _check_validation(
    recipe: Recipe, indexes: dict[str, Index | None], vocabulary: Vocabulary | None
) -> None:
    source = recipe.data.validation
    if source is None:
        return
    if source.format not in ("lvis", "objects365"):
        raise RecipeError(
            f"recipe {recipe.name}: data.validation has format {source.format}; the evaluation "
            "needs annotations in the format of LVIS or Objects365"
        )
    index = indexes[source.name]
    if (
        index is not None
        and vocabulary is not None
        and index.vocabulary.digest != vocabulary.digest
    ):
        raise RecipeError(
            f"recipe {recipe.name}: the validation source {source.name} has another vocabulary "
            f"than the detector: {index.vocabulary.difference(vocabulary)}"
        )


def _find_data(recipe: Recipe, source: Source) -> Index | None:
    """The index of a prepared source; None where raw data is there to prepare it from."""
    data = recipe.data
    try:
        return load_index(shards_url(data, source))
    except StorageError:
        places = [resolve(data.root, part) for part in (source.annotations, source.images) if part]
        absent = [place for place in places if not exists(place)]
        if data.miniature is not None or not absent:
            return None
        raise RecipeError(
            f"recipe {recipe.name}: source {source.name} has neither shards at "
            f"{shards_url(data, source)} nor raw data at {' and '.join(absent)}; set data.root to "
            "the folder that holds the raw data sets"
        ) from None


def _vocabulary(recipe: Recipe, indexes: dict[str, Index | None]) -> Vocabulary | None:
    """The detector's categories, where they can be known before anything is drawn."""
    source = recipe.data.vocabulary_source
    index = indexes[source.name]
    if index is not None:
        return index.vocabulary
    if exists(resolve(recipe.data.root, source.annotations or source.images)):
        return list_records(source, recipe.data.root).vocabulary
    return None


def _check_beginning(
    recipe: Recipe, earlier: dict[str, Recipe], vocabulary: Vocabulary | None
) -> None:
    """Its own checkpoint to continue from, or the other run that it starts from, must fit."""
    own = newest_verified(recipe.run_dir)
    if own is not None:
        refuse_another_recipe(own, recipe)
        theirs = Vocabulary.from_json(read_manifest(own).vocabulary)
        if vocabulary is not None and theirs.digest != vocabulary.digest:
            raise RecipeError(
                f"{own} was trained on another vocabulary: {theirs.difference(vocabulary)}; give "
                "the recipe a new name"
            )
        return
    if recipe.initialize_from is None:
        return
    before = earlier.get(recipe.initialize_from)
    if before is None:
        manifest = read_manifest(find_source(recipe))
        before = recipe_from_tree(manifest.recipe, f"the recipe of {recipe.initialize_from}")
    for key in type(recipe.detector).model_fields:
        ours, theirs_value = getattr(recipe.detector, key), getattr(before.detector, key)
        if key not in ("denoising", "losses", "dropout") and ours != theirs_value:
            raise RecipeError(
                f"recipe {recipe.name} starts from {before.name}, whose detector.{key} is another: "
                f"{theirs_value} there, {ours} here; make them equal"
            )
    if (
        recipe.detector.class_head.kind == "language"
        and recipe.teacher.model != before.teacher.model
    ):
        raise RecipeError(
            f"recipe {recipe.name} starts from {before.name}, whose class head works in the text "
            f"space of {before.teacher.model}, not of {recipe.teacher.model}; use one teacher"
        )


def _describe(
    recipe: Recipe, indexes: dict[str, Index | None], vocabulary: Vocabulary | None
) -> list[str]:
    training, cluster = recipe.training, recipe.cluster
    slice_size = training.batch_size // cluster.workers
    micro_steps = -(-slice_size // training.micro_batch)
    lines = [
        f"{recipe.name} (recipe {recipe.hash()}), in {recipe.run_dir}",
        f"  batch       {training.batch_size} images = {cluster.workers} workers x {slice_size}, "
        f"in {micro_steps} micro-steps of at most {training.micro_batch}; "
        f"ZeRO {training.zero_stage}, {training.precision}",
    ]
    if recipe.initialize_from:
        lines.append(f"  starts from {recipe.initialize_from}")
    if vocabulary is not None:
        groups = Counter(vocabulary.frequencies)
        text = f"  vocabulary  {vocabulary.num_categories} categories"
        if groups["r"] or groups["c"] or groups["f"]:
            text += f" ({groups['r']} rare, {groups['c']} common, {groups['f']} frequent)"
        lines.append(text)
    for source in sources_of(recipe):
        index = indexes[source.name]
        state = "to be prepared" if index is None else f"{index.num_samples:,} images prepared"
        lines.append(f"  source      {source.name} ({source.format}): {state}")
    lines.extend(_mixture(recipe, indexes, vocabulary))
    return lines


def _mixture(
    recipe: Recipe, indexes: dict[str, Index | None], vocabulary: Vocabulary | None
) -> list[str]:
    prepared = {name: index for name, index in indexes.items() if index is not None}
    used = [*recipe.data.train, *recipe.data.extra]
    steps = recipe.training.steps
    if vocabulary is None or any(source.name not in prepared for source in used):
        return [f"  steps       {steps:,}; the mixture is known once the sources are prepared"]
    from pipeline.data.stream import source_readers, training_plan

    readers = source_readers(used, prepared, vocabulary)
    plan = training_plan(recipe.data, recipe.training, readers, recipe.seed)
    kinds = Counter(plan.kind(step) for step in range(steps))
    samples: Counter[str] = Counter()
    for step in range(steps):
        samples.update(plan.sources(step))
    lengths = plan.epoch_lengths
    lines = [f"  steps       {steps:,}: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.items())]
    for name, number in samples.items():
        epochs = number / lengths[name]
        lines.append(
            f"  samples     {number:,} of {name}: {epochs:.2f} epochs of {lengths[name]:,}"
        )
    return lines
