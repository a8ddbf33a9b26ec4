"""What is inside a checkpoint: tensors by parameter name, as safetensors.

Nothing in it depends on world size or ZeRO stage, and reading it executes nothing.

    weights.safetensors     the student: `detector.*` and, where it was trained, `branch.*`
    averaged.safetensors    running averages of the trainable parameters (with `ema_decay`)
    optimizer.safetensors   AdamW: `exp_avg/NAME`, `exp_avg_sq/NAME`, `updates`
    manifest.json           step, plan, recipe, vocabulary, sizes and sha256 of the files
"""

import importlib.metadata
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from pipeline.data.images import decoder_name
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_from_tree
from pipeline.training.locate import Checkpoint
from pipeline.training.manifest import (
    AVERAGED,
    DETECTOR_FILES,
    MANIFEST,
    METADATA,
    ONE_FILE,
    OPTIMIZER,
    WEIGHTS,
    Manifest,
    checkpoint_dir,
    is_one_file,
    keep_newest,
    newest_verified,
    publish,
    read_manifest,
    remove_unfinished,
    unfinished,
    verify,
)
from pipeline.training.space import error_of_library, with_room
from pipeline.training.student import DETECTOR_PREFIX, export_state
from pipeline.training.whereabouts import here

logger = logging.getLogger(__name__)

DECODER = "jpeg decoder"
"""Key of a manifest's versions under which the decoder of images is."""
TEXT = "text_embeddings"
VERSIONS_OF = ("torch", "torchvision", "deepspeed", "ray", "timm", "open_clip_torch", "numpy")
_SAME_TEXT = 0.5
"""Mean cosine of the same names above which two texts are taken to be of one tower: those of towers
that were trained apart have one about zero, and of other prompts of one tower 0.93 and more, as
measured."""


@dataclass(frozen=True)
class State:
    """A student and its optimizer as plain CPU tensors by parameter name.

    `weights` are all parameters and persistent buffers, `averaged` the trainable parameters'
    averages (empty without `ema_decay`), `moments` are AdamW's, `exp_avg/NAME` and
    `exp_avg_sq/NAME`, after `updates` applied updates.
    """

    weights: Mapping[str, Tensor]
    averaged: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    updates: int


@dataclass
class Progress:
    """Where a run stands: steps done, steps skipped among them, the plan that they follow, and what
    they consumed: `samples` by source, `instances` (labelled boxes) by frequency group.
    `unreadable` has the images that could not be read, with their reasons."""

    step: int
    skipped_steps: int
    plan: dict[str, int | str]
    samples: Counter[str] = field(default_factory=Counter)
    instances: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)

    def consumed(self) -> dict[str, dict[str, int]]:
        """As manifests and log lines have it."""
        return {"samples": dict(self.samples), "instances": dict(self.instances)}


@dataclass
class Initialization:
    """What `initialize_from` gave: names by what became of them, and matched categories."""

    source: str
    copied: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    matched_categories: int = 0
    num_categories: int = 0
    another_head: bool = False

    def __str__(self) -> str:
        text = (
            f"initialised from {self.source}: {len(self.copied)} tensors copied, "
            f"{len(self.fresh)} kept fresh, {len(self.unused)} of the source not used"
        )
        if self.mapped:
            text += (
                f", rows of {len(self.mapped)} mapped for {self.matched_categories} of "
                f"{self.num_categories} categories"
            )
        if self.another_head:
            text += "; the class heads there are of another kind or another text, and begin anew"
        return text


def save(
    state: State, progress: Progress, recipe: Recipe, vocabulary: Vocabulary, world_size: int
) -> Path:
    """Publish a checkpoint, then remove those beyond `keep_checkpoints`; for one rank only."""
    manifest = Manifest(
        step=progress.step,
        skipped_steps=progress.skipped_steps,
        plan=dict(progress.plan),
        recipe_hash=recipe.hash(),
        recipe=recipe.model_dump(mode="json"),
        vocabulary_digest=vocabulary.digest,
        vocabulary=vocabulary.to_json(),
        consumed=progress.consumed(),
        versions=_versions(),
        world_size=world_size,
        files={},
        unreadable=dict(progress.unreadable),
    )
    directory = checkpoint_dir(recipe.run_dir, progress.step)

    def write(partial: Path) -> None:
        updates = {"updates": torch.tensor(state.updates)}
        _write_tensors(partial / WEIGHTS, state.weights)
        _write_tensors(partial / OPTIMIZER, {**state.moments, **updates})
        if state.averaged:
            _write_tensors(partial / AVERAGED, state.averaged)

    tensors = (*state.weights.values(), *state.moments.values(), *state.averaged.values())

    def attempt() -> None:
        remove_unfinished(recipe.run_dir)
        publish(directory, manifest, write, replace=True)

    with_room(directory, sum(tensor.nbytes for tensor in tensors), attempt)
    verify(directory)
    keep = recipe.training.keep_checkpoints
    with_room(directory, 0, lambda: keep_newest(recipe.run_dir, keep, directory))
    return directory


def load_state(directory: Path) -> State:
    """Everything that a run continues from."""
    moments = _read_tensors(directory / OPTIMIZER)
    updates = int(moments.pop("updates"))
    averaged = directory / AVERAGED
    return State(
        weights=_read_tensors(directory / WEIGHTS),
        averaged=_read_tensors(averaged) if averaged.exists() else {},
        moments=moments,
        updates=updates,
    )


def restore(module: nn.Module, state: State, directory: Path, vocabulary: Vocabulary) -> None:
    """Put a checkpoint's weights into a student, all of them; raises `RecipeError` otherwise."""
    theirs = Vocabulary.from_json(read_manifest(directory).vocabulary)
    if theirs != vocabulary:
        raise RecipeError(
            f"{directory} was trained on another vocabulary, the first of these two: "
            f"{theirs.difference(vocabulary)}. Give the recipe a new name, and name the old one in "
            "initialize_from to carry over the categories that both have"
        )
    load_strictly(module, state.weights, str(directory))


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load weights whose names and shapes are exactly the module's; raises `RecipeError`."""
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"{name} is missing" for name in sorted(ours.keys() - theirs.keys())]
    problems += [f"{name} is not in this model" for name in sorted(theirs.keys() - ours.keys())]
    problems += [
        f"{name} has shape {theirs[name]}, this model {ours[name]}"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name]
    ]
    if problems:
        more = f" and {len(problems) - 8} more differences" if len(problems) > 8 else ""
        raise RecipeError(
            f"{origin} is a checkpoint of another model: {'; '.join(problems[:8])}{more}. Use the "
            "detector section that it was trained with, or remove it and start over"
        )
    module.load_state_dict(dict(weights))


def load_weights(directory: Path, ema: bool) -> dict[str, Tensor]:
    """The detector's weights under its own names; averaged ones on request, where there are any."""
    weights = _read_tensors(directory if is_one_file(directory) else directory / WEIGHTS)
    if ema and (directory / AVERAGED).exists():
        weights |= _read_tensors(directory / AVERAGED)
    return export_state(weights)


def load_detector(
    directory: Path, use_ema: bool, manifest: Manifest | None = None
) -> tuple[nn.Module, Vocabulary, Recipe]:
    """A checkpoint's detector, in evaluation mode, with neither DeepSpeed nor teacher.

    The files that it is read from are verified, unless their verified `manifest` is given.
    """
    from pipeline.detectors import build_detector

    manifest = manifest or verify(directory, DETECTOR_FILES)
    recipe = recipe_from_tree(manifest.recipe, f"the recipe of {directory}")
    vocabulary = Vocabulary.from_json(manifest.vocabulary)
    if not vocabulary.num_categories:
        raise RecipeError(
            f"{directory} has no category names, so it can start a training (initialize_from) and "
            "cannot detect; import it again with --annotations"
        )
    weights = load_weights(directory, use_ema)
    embeddings = [t for name, t in weights.items() if name.split(".")[-1] == TEXT]
    backbone = recipe.detector.backbone.model_copy(update={"weights": None})
    detector = build_detector(
        recipe.detector.model_copy(update={"backbone": backbone}),
        num_categories=vocabulary.num_categories,
        text_embeddings=embeddings[0] if embeddings else None,
    )
    load_strictly(detector, weights, str(directory))
    return detector.eval(), vocabulary, recipe


def find_source(recipe: Recipe) -> Path:
    """The checkpoint that `initialize_from` means: a run beside this one, or a path of a run, of a
    checkpoint or of an exported or imported detector.

    Raises `RecipeError` when there is none.
    """
    assert recipe.initialize_from is not None
    places = [Path(recipe.output) / recipe.initialize_from, Path(recipe.initialize_from)]
    for place in places:
        step = place.name.startswith("step_") and place.is_dir()
        if step or is_one_file(place) or (place / MANIFEST).is_file():
            verify(place)
            return place
        newest = newest_verified(place)
        if newest is not None:
            return newest
    raise RecipeError(
        f"initialize_from {recipe.initialize_from!r}: no checkpoint in "
        f"{' nor in '.join(str(place) for place in places)}; train that recipe first, or give the "
        "path of a run or checkpoint directory"
    )


def initialize(detector: nn.Module, directory: Path, vocabulary: Vocabulary) -> Initialization:
    """Copy a checkpoint's detector into a fresh one, by name, across vocabularies.

    Rows of per-category parameters go to the column of the same category; the others stay fresh,
    and so do per-category buffers (text embeddings), which follow from this recipe, and a class
    head of another kind, or of text in another space. Averaged weights are taken where the source
    has them. Raises `RecipeError` for another shape, or when nothing fits.
    """
    source, manifest = load_weights(directory, ema=True), read_manifest(directory)
    theirs = Vocabulary.from_json(manifest.vocabulary)
    columns = torch.from_numpy(vocabulary.columns_from(theirs))
    matched = columns >= 0
    category_axes: dict[str, int] = detector.category_parameters()  # type: ignore[operator]
    parameters = {name for name, _ in detector.named_parameters()}
    report = Initialization(str(directory), num_categories=vocabulary.num_categories)
    report.matched_categories = int(columns[matched].unique().numel())
    target = detector.state_dict()
    report.unused = sorted(source.keys() - target.keys())
    recipe = recipe_from_tree(manifest.recipe, f"the recipe of {directory}")
    language = recipe.detector.class_head.kind == "language"
    heads: tuple[str, ...] = detector.class_heads  # type: ignore[assignment]
    if language != (TEXT in target):
        report.another_head = True
    elif language and TEXT not in source:
        # As an imported one may come; here it has its own, of which the heads tell the width.
        report.another_head = any(
            name.split(".")[0] in heads and given.shape != target[name].shape
            for name, given in source.items()
            if name in target and name not in category_axes
        )
    elif language:
        report.another_head = _is_another_text(source[TEXT], target[TEXT], columns)
    for name, tensor in target.items():
        given = source.get(name)
        of_head = report.another_head and name.split(".")[0] in heads
        if given is None or of_head or (name in category_axes and name not in parameters):
            report.fresh.append(name)
        elif name in category_axes and _rows_of(given, tensor, category_axes[name], theirs):
            axis = category_axes[name]
            rows = given.index_select(axis, matched.nonzero()[:, 0]).to(tensor)
            tensor.index_copy_(axis, columns[matched].to(tensor.device), rows)
            report.mapped.append(name)
        elif name in category_axes or given.shape != tensor.shape:
            raise RecipeError(
                f"initialize_from {directory}: {name} has shape {tuple(given.shape)} there and "
                f"{tuple(tensor.shape)} here; both recipes need the same detector section"
            )
        else:
            tensor.copy_(given)
            report.copied.append(name)
    if not report.copied:
        raise RecipeError(f"initialize_from {directory}: no parameter there fits this detector")
    return report


def _is_another_text(theirs: Tensor, ours: Tensor, columns: Tensor) -> bool:
    """Whether the text embeddings of two language heads are in different spaces, where what was
    learnt for the one means nothing in the other.

    Other prompts leave a name near to where it was; towers that were trained apart put it anywhere,
    so that its two places have a cosine about zero. `columns` is the category here of each one
    there, -1 without. Where no category is known to be shared, text of equal width counts as that
    of one tower.
    """
    if theirs.shape[1] != ours.shape[1]:
        return True
    shared = columns >= 0
    if len(columns) != len(theirs) or not shared.any():
        return False
    before, now = theirs[shared].float(), ours[columns[shared]].float().to(theirs.device)
    return bool(functional.cosine_similarity(before, now).mean() < _SAME_TEXT)


def _rows_of(given: Tensor, tensor: Tensor, axis: int, theirs: Vocabulary) -> bool:
    """Whether `given` has a row for each of their categories, and rows like those of `tensor`."""
    alike = (*given.shape[:axis], *given.shape[axis + 1 :]) == (
        *tensor.shape[:axis],
        *tensor.shape[axis + 1 :],
    )
    # An imported checkpoint may not know its categories: nothing of it is carried over by row.
    return alike and theirs.num_categories in (0, given.shape[axis])


def export_detector(found: Checkpoint, output: Path) -> Path:
    """Write the detector alone, as `publish_detector` does.

    Its manifest holds the recipe that was asked for, so that it is used as that says.
    """
    manifest = replace(
        found.manifest,
        recipe_hash=found.recipe.hash(),
        recipe=found.recipe.model_dump(mode="json"),
        files={},
    )
    state = load_weights(found.directory, found.recipe.evaluation.use_ema)
    return publish_detector(output, manifest, state)


def publish_detector(output: Path, manifest: Manifest, state: Mapping[str, Tensor]) -> Path:
    """Write a detector's weights as a checkpoint that `load_detector` reads: into a new folder, or
    into one file where `output` ends in `ONE_FILE`. Raises `StorageError`."""
    if output.exists():
        raise StorageError(f"{output} exists already; name another")
    weights = {DETECTOR_PREFIX + name: tensor for name, tensor in state.items()}
    if output.suffix != ONE_FILE:
        publish(output, manifest, lambda partial: _write_tensors(partial / WEIGHTS, weights))
        return output
    partial = unfinished(output)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        _write_tensors(partial, weights, {METADATA: manifest.to_json()})
        partial.rename(output)
    except OSError as error:
        raise StorageError(f"{output} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return output


def first_manifest(recipe: Recipe, vocabulary: Vocabulary) -> Manifest:
    """The manifest of a detector that no run of ours has trained yet."""
    return Manifest(
        step=0,
        skipped_steps=0,
        plan={},
        recipe_hash=recipe.hash(),
        recipe=recipe.model_dump(mode="json"),
        vocabulary_digest=vocabulary.digest,
        vocabulary=vocabulary.to_json(),
        consumed={"samples": {}, "instances": {}},
        versions=_versions(),
        world_size=1,
        files={},
    )


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    return {**versions, DECODER: decoder_name()}


def _write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    here.move()
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise error_of_library(error) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    here.move()
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} could not be read: {error}") from error
    return tensors
