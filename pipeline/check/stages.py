"""Refuse what cannot work before anything is spent, and say what a stage is going to do."""

from collections.abc import Sequence

from pipeline.check.beginning import check_beginning
from pipeline.check.describe import bounds, describe
from pipeline.check.machine import check_machine
from pipeline.check.needs import needs_teacher, sources_of
from pipeline.check.prepared import check_labels, find_data, vocabulary_of
from pipeline.data.shards.index import Index
from pipeline.data.storage.files import exists, resolve
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe


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


def _check_stage(recipe: Recipe, earlier: dict[str, Recipe]) -> str:
    check_machine(recipe)
    _check_teacher(recipe)
    backbone = _check_backbone(recipe)
    indexes = {source.name: find_data(recipe, source) for source in sources_of(recipe)}
    vocabulary = vocabulary_of(recipe, indexes)
    check_labels(recipe, indexes, vocabulary)
    _check_text(recipe, vocabulary)
    if recipe.data.validation is not None and not _is_made_again(recipe):
        check_validation(recipe, indexes[recipe.data.validation.name], vocabulary)
    beginning = check_beginning(recipe, earlier, vocabulary)
    lines = [*describe(recipe, indexes, vocabulary), *beginning, backbone]
    lines.append(bounds(recipe, vocabulary))
    return "\n".join(lines)


def _check_teacher(recipe: Recipe) -> None:
    if not needs_teacher(recipe):
        return
    from pipeline.semantics.clip import check_weights, model_config
    from pipeline.semantics.towers.choice import regions_of

    config = model_config(recipe.teacher.model)
    if recipe.uses_soft_labels:
        regions_of(recipe.teacher, config)
    if recipe.teacher.train is None:
        check_weights(recipe.teacher)


def _check_text(recipe: Recipe, vocabulary: Vocabulary | None) -> None:
    """Names that the text tower reads whole, or ready-made embeddings that fit."""
    if needs_teacher(recipe) and vocabulary is not None:
        from pipeline.semantics.text import check_text

        check_text(recipe.teacher, vocabulary.names)


def _check_backbone(recipe: Recipe) -> str:
    """Build it without memory; what it will hold, before any activation and without ZeRO."""
    import torch

    from pipeline.detectors.backbone import Backbone, is_local
    from pipeline.detectors.memory import training_memory

    section = recipe.detector.backbone
    # On the meta device a local file is compared with the model, and nothing is downloaded.
    with torch.device("meta"):
        local = section.weights is not None and is_local(section.weights)
        backbone = Backbone(section, pretrained=local)
    memory = training_memory(backbone)
    parameters = sum(p.numel() for p in backbone.parameters())
    return (
        f"  backbone    {section.name}, {parameters / 1e6:.1f} M parameters: "
        f"{memory.weights / 1e9:.2f} GB of weights, {memory.gradients / 1e9:.2f} of gradients, "
        f"{memory.optimizer / 1e9:.2f} of AdamW's moments"
    )


def _is_made_again(recipe: Recipe) -> bool:
    """Whether `prepare` makes validation shards of other categories again, as it does with the free
    names of Visual Genome where the raw data are; it looks once more at their end."""
    source = recipe.data.validation
    assert source is not None
    if source.format != "visual_genome" or source.annotations is None:
        return False
    return exists(resolve(recipe.data.root, source.annotations))


def check_validation(recipe: Recipe, index: Index | None, vocabulary: Vocabulary | None) -> None:
    """Refuse the index of a validation source that the detector cannot be evaluated on."""
    source = recipe.data.validation
    assert source is not None
    scaled = index.report.get("scaled") if index is not None else None
    if isinstance(scaled, dict) and scaled.get("images"):
        raise RecipeError(
            f"recipe {recipe.name}: {scaled['images']:,} images of the validation source "
            f"{source.name} were stored smaller, and AP is in pixels as published; prepare it "
            "without data.store_short_side"
        )
    if (
        index is not None
        and vocabulary is not None
        and index.vocabulary.digest != vocabulary.digest
    ):
        fix = ""
        if source.format == "visual_genome":
            fix = (
                "; its shards were prepared with other categories: delete them, or give the source "
                "another name, and `longtail prepare` makes them with the detector's"
            )
        raise RecipeError(
            f"recipe {recipe.name}: the validation source {source.name} has another vocabulary "
            f"than the detector: {index.vocabulary.difference(vocabulary)}{fix}"
        )
