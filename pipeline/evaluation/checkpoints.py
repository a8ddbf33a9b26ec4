"""The evaluation of a run: a checkpoint on the validation source, into the run's directory."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.data.shards import Index, load_index, shards_url
from pipeline.data.storage import read_bytes, resolve
from pipeline.data.stream import EvaluationSet
from pipeline.errors import RecipeError, StorageError
from pipeline.evaluation.detect import detect
from pipeline.evaluation.detections import load_detections
from pipeline.evaluation.examples import save_examples
from pipeline.evaluation.ground_truth import parse_ground_truth
from pipeline.evaluation.official import official_lvis
from pipeline.evaluation.results import (
    AP_KEYS,
    Results,
    evaluate_detections,
    evaluation_dir,
    format_comparison,
    format_fraction,
    format_table,
    write_results,
)
from pipeline.evaluation.subset import stratified_subset
from pipeline.recipe import Recipe, Source
from pipeline.training.checkpoint import load_detector
from pipeline.training.device import worker_device
from pipeline.training.log import append_event, sink_values
from pipeline.training.manifest import (
    MANIFEST,
    evaluation_done,
    file_digest,
    newest_verified,
    read_manifest,
    waiting_for_evaluation,
)
from pipeline.training.sinks import open_sinks

logger = logging.getLogger(__name__)

OnImages = Callable[[int, int], None]
"""Told images done and images in all."""


def evaluate_newest(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    *,
    official: bool = False,
    progress: OnImages | None = None,
) -> str:
    """Evaluate the newest checkpoint on all images; the table as text.

    Raises `RecipeError` without a validation source in LVIS format, `StorageError` without a
    checkpoint.
    """
    source = _validation_source(recipe)
    directory = newest_verified(recipe.run_dir)
    if directory is None:
        raise StorageError(f"no checkpoint in {recipe.run_dir}; run `longtail train` first")
    results = _evaluate(recipe, source, directory, device, subset=False, progress=progress)
    text = format_table(results)
    if official:
        annotations = json.loads(read_bytes(resolve(recipe.data.root, source.annotations or "")))
        detections = evaluation_dir(recipe.run_dir, results["step"]) / "detections.json"
        results["official"] = official_lvis(annotations, load_detections(detections))
        text += "\n" + format_comparison(results, results["official"])
    return text


def evaluate_waiting(
    recipe: Recipe, device: torch.device | str = "cpu", progress: OnImages | None = None
) -> str | None:
    """Evaluate the oldest checkpoint that waits for it, on the recipe's fixed subset of images.

    The figures in one line, or None where no checkpoint waits.
    """
    source = _validation_source(recipe)
    waiting = waiting_for_evaluation(recipe.run_dir)
    if not waiting:
        return None
    results = _evaluate(recipe, source, waiting[0], device, subset=True, progress=progress)
    evaluation_done(waiting[0])
    figures = " ".join(f"{key} {format_fraction(results[key])}" for key in LIVE_KEYS)
    consumed = results["consumed"]
    groups = " ".join(f"{group} {count:,}" for group, count in consumed["instances"].items())
    return (
        f"evaluation at step {results['step']:,}: {figures} ({results['subset']}, "
        f"{results['seconds']:.0f} s; trained on {sum(consumed['samples'].values()):,} samples, "
        f"boxes {groups})"
    )


def evaluate_all_waiting(recipe: Recipe) -> None:
    """`evaluate_waiting` in line, on this worker's device, until no checkpoint waits."""
    while text := evaluate_waiting(recipe, worker_device(recipe)):
        logger.info("%s", text)


LIVE_KEYS = ("AP", "APr", "APc", "APf")


def _validation_source(recipe: Recipe) -> Source:
    source = recipe.data.validation
    if source is None or source.format != "lvis" or source.annotations is None:
        raise RecipeError(
            f"recipe {recipe.name}: evaluation needs data.validation, a source of format lvis"
        )
    return source


def _evaluate(
    recipe: Recipe,
    source: Source,
    directory: Path,
    device: torch.device | str,
    *,
    subset: bool,
    progress: OnImages | None,
) -> Results:
    """Detect with a checkpoint and score; results, examples and log lines are written."""
    section = recipe.evaluation
    manifest = read_manifest(directory)
    detector, vocabulary, _ = load_detector(directory, section.use_ema)
    detector.to(device)
    assert source.annotations is not None
    annotations = json.loads(read_bytes(resolve(recipe.data.root, source.annotations)))
    truth = parse_ground_truth(annotations, source.annotations)
    index = load_index(shards_url(recipe.data, source))
    chosen = stratified_subset(truth, section.subset_images, recipe.seed) if subset else None
    images = EvaluationSet(recipe.data, index, vocabulary, chosen)
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        if progress:
            progress(done, images.num_images)

    started = time.monotonic()
    batches = images.iterate(section.batch_size)
    detections = detect(
        detector, batches, device, section.max_detections, vocabulary, progress=count
    )
    seconds = time.monotonic() - started
    counts = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).image_counts()
    results = evaluate_detections(truth, detections, vocabulary, counts)
    results["step"] = manifest.step
    results["images_per_second"] = images.num_images / seconds
    results["seconds"] = time.monotonic() - started
    results["consumed"] = manifest.consumed
    if subset:
        results["subset"] = f"{images.num_images:,} of {len(truth.image_ids):,} images"
    folder = evaluation_dir(recipe.run_dir, manifest.step)
    folder.mkdir(parents=True, exist_ok=True)
    save_examples(folder, truth, detections, _image_reader(index), section.example_images)
    results["of"] = _identity(recipe, directory, subset=subset)
    write_results(recipe.run_dir, manifest.step, results, detections)
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
    section = recipe.evaluation
    return {
        "checkpoint": file_digest(directory / MANIFEST)["sha256"],
        "max_detections": section.max_detections,
        "use_ema": section.use_ema,
        "example_images": section.example_images,
        "subset": section.subset_images if subset else None,
    }


def _image_reader(index: Index) -> Callable[[int], bytes]:
    places: Mapping[int, int] = {int(image): i for i, image in enumerate(index.image_id)}
    return lambda image_id: index.read(places[image_id]).image


def _log(recipe: Recipe, results: Results) -> None:
    """One line in metrics.jsonl. The trainer passes it on to the sinks; after it, nobody else."""
    kept = ("protocol", "subset", "seconds", "images_per_second", "consumed")
    values: dict[str, Any] = {key: results[key] for key in AP_KEYS}
    values |= {key: results[key] for key in kept if key in results}
    append_event(recipe.run_dir, "evaluation", results["step"], values)
    if "subset" not in results:
        for sink in open_sinks(recipe):
            sink.write(results["step"], sink_values({"event": "evaluation", **values}))
            sink.close()
