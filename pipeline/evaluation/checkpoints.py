"""The evaluation of a run: a checkpoint on the validation source, into the run's directory."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.shards.ground_truth import FILE, load_ground_truth
from pipeline.data.shards.preparing import Index, load_index, shards_url
from pipeline.data.storage.files import read_bytes, resolve
from pipeline.data.stream.batches import EvaluationSet
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import LongtailError, RecipeError, StorageError
from pipeline.evaluation.average_precision import evaluate_coco
from pipeline.evaluation.detect import detect
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.examples import save_examples
from pipeline.evaluation.files import COCO_STYLE
from pipeline.evaluation.ground_truth import (
    Annotations,
    GroundTruth,
    parse_ground_truth,
    without_federation,
)
from pipeline.evaluation.official import official_lvis
from pipeline.evaluation.results import (
    AP_KEYS,
    Results,
    check_vocabulary,
    evaluate_detections,
    evaluation_dir,
    write_results,
)
from pipeline.evaluation.subset import stratified_subset
from pipeline.evaluation.tables import format_comparison, format_fraction, format_table
from pipeline.recipe import Recipe, Source
from pipeline.recipe.data import EVALUATED_FORMATS, WRITTEN_TRUTH
from pipeline.training.checkpoint import load_detector
from pipeline.training.device import worker_device
from pipeline.training.locate import locate_checkpoint
from pipeline.training.log import run_lock
from pipeline.training.manifest import (
    MANIFEST,
    evaluation_done,
    file_digest,
    is_one_file,
    newest_verified,
    read_manifest,
    waiting_for_evaluation,
)
from pipeline.training.metrics import SinkFeed, append_event

logger = logging.getLogger(__name__)

OnImages = Callable[[int, int], None]
"""Told images done and images in all."""


def checkpoint_to_evaluate(
    recipe: Recipe, *, official: bool = False, checkpoint: Path | None = None
) -> Path:
    """The newest checkpoint, of a recipe that can be evaluated, or another `checkpoint` with it.

    A validation source in LVIS format is scored by LVIS's protocol, others by COCO's.
    Raises `RecipeError` without one of them, when the `official` package is wanted for another than
    LVIS, or when the recipe's run has checkpoints of its own; `StorageError` without a checkpoint,
    or without the ground truth that `prepare` writes.
    """
    if _validation_source(recipe).format != "lvis" and official:
        raise RecipeError("--official runs the lvis package, and data.validation is not LVIS")
    if _validation_source(recipe).format in WRITTEN_TRUTH:
        _annotations(recipe)  # Before anything is detected.
    directory = newest_verified(recipe.run_dir)
    if checkpoint is not None:
        if directory is not None:
            raise RecipeError(
                f"{recipe.run_dir} has checkpoints of its own, whose results must not mix with "
                f"those of {checkpoint}; give the evaluation a run of its own: name=ANOTHER"
            )
        return locate_checkpoint(checkpoint).directory
    if directory is None:
        raise StorageError(f"no checkpoint in {recipe.run_dir}; run `longtail train` first")
    return directory


def detect_part(
    recipe: Recipe,
    directory: Path,
    device: torch.device | str = "cpu",
    *,
    part: int = 0,
    num_parts: int = 1,
    image_ids: NDArray[np.int64] | None = None,
    progress: OnImages | None = None,
) -> Detections:
    """Detections of a checkpoint on one of `num_parts` parts of the validation images, or of those
    with `image_ids`; the parts share no image and leave none out."""
    section, source = recipe.evaluation, _validation_source(recipe)
    detector, vocabulary, _ = load_detector(directory, section.use_ema)
    index = load_index(shards_url(recipe.data, source))
    images = EvaluationSet(recipe.data, index, vocabulary, image_ids)
    number = images.num_images_of(part, num_parts)
    done = 0

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        if progress:
            progress(done, number)

    batches = images.iterate(section.batch_size, part, num_parts)
    limit = section.max_detections
    return detect(detector.to(device), batches, device, limit, vocabulary, progress=count)


def score_newest(
    recipe: Recipe, directory: Path, detections: Detections, seconds: float, *, official: bool
) -> str:
    """Score what was detected on all images, in `seconds`; the table as text."""
    annotations = _annotations(recipe)
    results = _score(recipe, directory, annotations, detections, seconds, subset=False)
    text = format_table(results)
    if official:
        results["official"] = official_lvis(annotations, detections)
        text += "\n" + format_comparison(results, results["official"])
    return text


def evaluate_newest(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    *,
    official: bool = False,
    checkpoint: Path | None = None,
) -> str:
    """Evaluate the newest checkpoint, or a given one, on all images in this process; the table as
    text."""
    directory = checkpoint_to_evaluate(recipe, official=official, checkpoint=checkpoint)
    started = time.monotonic()
    detections = detect_part(recipe, directory, device)
    seconds = time.monotonic() - started
    return score_newest(recipe, directory, detections, seconds, official=official)


def evaluate_waiting(recipe: Recipe, device: torch.device | str = "cpu") -> str | None:
    """Evaluate the oldest checkpoint that waits for it, on the recipe's fixed subset of images.

    The figures in one line, or None where no checkpoint waits.
    """
    waiting = waiting_for_evaluation(recipe.run_dir)
    if not waiting:
        return None
    started = time.monotonic()
    annotations = _annotations(recipe)
    truth = _boxes(recipe, annotations)
    # Not by the recipe's seed: runs with other seeds are to be compared.
    chosen = stratified_subset(truth, recipe.evaluation.subset_images)
    before = time.monotonic()
    detections = detect_part(recipe, waiting[0], device, image_ids=chosen)
    seconds = time.monotonic() - before
    results = _score(recipe, waiting[0], annotations, detections, seconds, subset=True)
    evaluation_done(waiting[0])
    figures = " ".join(f"{key} {format_fraction(results[key])}" for key in LIVE_KEYS)
    consumed = results["consumed"]
    groups = " ".join(f"{group} {count:,}" for group, count in consumed["instances"].items())
    return (
        f"evaluation at step {results['step']:,}: {figures} ({results['subset']}, "
        f"{time.monotonic() - started:.0f} s; trained on "
        f"{sum(consumed['samples'].values()):,} samples, boxes {groups})"
    )


def evaluate_all_waiting(recipe: Recipe) -> None:
    """`evaluate_waiting` in line, on this worker's device, until no checkpoint waits.

    One that cannot be evaluated is given up with a warning: training goes on without it.
    """
    while waiting := waiting_for_evaluation(recipe.run_dir):
        try:
            logger.info("%s", evaluate_waiting(recipe, worker_device(recipe)))
        except (LongtailError, OSError) as error:
            logger.warning("evaluation of %s is given up: %s", waiting[0].name, error)
            evaluation_done(waiting[0])


LIVE_KEYS = ("AP", "APr", "APc", "APf")


def _validation_source(recipe: Recipe) -> Source:
    source = recipe.data.validation
    if source is None:
        raise RecipeError(
            f"recipe {recipe.name}: evaluation needs data.validation, a source of format "
            f"{' or '.join(EVALUATED_FORMATS)}"
        )
    return source


def _annotations(recipe: Recipe) -> Annotations:
    source = _validation_source(recipe)
    if source.format in WRITTEN_TRUTH:
        return load_ground_truth(load_index(shards_url(recipe.data, source)))
    path = resolve(recipe.data.root, source.annotations or "")
    tree: Annotations = json.loads(read_bytes(path))
    return tree


def _boxes(recipe: Recipe, annotations: Annotations) -> GroundTruth:
    """The annotations as arrays; of an exhaustive data set for choosing and drawing images only."""
    source = _validation_source(recipe)
    tree = annotations if source.format == "lvis" else without_federation(annotations)
    written = source.format in WRITTEN_TRUTH
    return parse_ground_truth(tree, f"{source.name}/{FILE}" if written else str(source.annotations))


def _score(
    recipe: Recipe,
    directory: Path,
    annotations: Annotations,
    detections: Detections,
    seconds: float,
    *,
    subset: bool,
) -> Results:
    """Figures of a checkpoint's detections; results, examples and log lines are written."""
    source, manifest = _validation_source(recipe), read_manifest(directory)
    vocabulary = Vocabulary.from_json(manifest.vocabulary)
    truth = _boxes(recipe, annotations)
    counts = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).image_counts()
    if source.format == "lvis":
        results = evaluate_detections(truth, detections, vocabulary, counts)
    else:
        check_vocabulary(truth, vocabulary)
        results = evaluate_coco(
            annotations,
            detections,
            origin=str(source.annotations),
            name=COCO_STYLE[source.format],
            train_image_counts=counts,
        )
    assert detections.images is not None, "a detector says what it saw"
    results["step"] = manifest.step
    results["images_per_second"] = len(detections.images) / seconds
    results["seconds"] = seconds
    results["consumed"] = manifest.consumed
    results["ground_truth"] = truth.subset(detections.images).digest()
    if subset:
        results["subset"] = f"{len(detections.images):,} of {len(truth.image_ids):,} images"
    folder = evaluation_dir(recipe.run_dir, manifest.step, subset=subset)
    folder.mkdir(parents=True, exist_ok=True)
    reader = _image_reader(load_index(shards_url(recipe.data, source)))
    save_examples(folder, truth, detections, reader, recipe.evaluation.example_images)
    results["of"] = _identity(recipe, directory, subset=subset)
    write_results(recipe.run_dir, manifest.step, results, detections, subset=subset)
    _log(recipe, results)
    return results


def is_evaluated(recipe: Recipe) -> bool:
    """Whether the newest checkpoint has been evaluated as the recipe asks, last of all."""
    directory, path = newest_verified(recipe.run_dir), recipe.run_dir / "results.json"
    if directory is None or not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8")).get("of")
    return bool(found == _identity(recipe, directory, subset=False))


def _identity(recipe: Recipe, directory: Path, *, subset: bool) -> dict[str, object]:
    """What figures are of: the very checkpoint, and the way that it is evaluated."""
    section, source = recipe.evaluation, _validation_source(recipe)
    return {
        "data": [recipe.data.root, source.model_dump(mode="json")],
        "checkpoint": file_digest(directory if is_one_file(directory) else directory / MANIFEST)[
            "sha256"
        ],
        "max_detections": section.max_detections,
        "use_ema": section.use_ema,
        "example_images": section.example_images,
        "subset": section.subset_images if subset else None,
    }


def _image_reader(index: Index) -> Callable[[int], bytes]:
    places: Mapping[int, int] = {int(image): i for i, image in enumerate(index.image_id)}
    return lambda image_id: index.read(places[image_id]).image


def _log(recipe: Recipe, results: Results) -> None:
    """One line in metrics.jsonl, passed on to the sinks, by the trainer if there is one."""
    kept = (
        "protocol", "subset", "ground_truth", "seconds", "images_per_second", "consumed",
    )  # fmt: skip
    values: dict[str, Any] = {key: results[key] for key in AP_KEYS}
    values |= {key: results[key] for key in kept if key in results}
    append_event(recipe.run_dir, "evaluation", results["step"], values)
    try:
        with run_lock(recipe.run_dir, patience_s=0):
            SinkFeed(recipe).close()
    except StorageError:
        pass  # A trainer holds the run; it passes the line on.
