"""The evaluation of a run: its newest checkpoint on the validation source, into its directory."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pipeline.data.shards import Index, load_index, shards_url
from pipeline.data.storage import read_bytes, resolve
from pipeline.data.stream import EvaluationSet
from pipeline.errors import RecipeError, StorageError
from pipeline.evaluation.detect import detect
from pipeline.evaluation.examples import save_examples
from pipeline.evaluation.ground_truth import parse_ground_truth
from pipeline.evaluation.official import official_lvis
from pipeline.evaluation.results import (
    AP_KEYS,
    Results,
    evaluate_detections,
    evaluation_dir,
    format_comparison,
    format_table,
    write_results,
)
from pipeline.recipe import Recipe
from pipeline.training.checkpoint import load_detector
from pipeline.training.manifest import MANIFEST, file_digest, newest_verified, read_manifest


def evaluate_newest(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    *,
    official: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Detect with the newest checkpoint, score, write results and examples; the table as text.

    `progress` gets (images done, images in all). Raises `RecipeError` without a validation source
    in LVIS format, `StorageError` without a checkpoint.
    """
    source = recipe.data.validation
    if source is None or source.format != "lvis" or source.annotations is None:
        raise RecipeError(
            f"recipe {recipe.name}: evaluation needs data.validation, a source of format lvis"
        )
    directory = newest_verified(recipe.run_dir)
    if directory is None:
        raise StorageError(f"no checkpoint in {recipe.run_dir}; run `longtail train` first")
    step = read_manifest(directory).step
    detector, vocabulary, _ = load_detector(directory, recipe.evaluation.use_ema)
    detector.to(device)
    index = load_index(shards_url(recipe.data, source))
    images = EvaluationSet(recipe.data, index, vocabulary)
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        if progress:
            progress(done, images.num_images)

    started = time.monotonic()
    batches = images.iterate(recipe.evaluation.batch_size)
    limit = recipe.evaluation.max_detections
    detections = detect(detector, batches, device, limit, vocabulary, progress=count)
    seconds = time.monotonic() - started

    annotations = json.loads(read_bytes(resolve(recipe.data.root, source.annotations)))
    truth = parse_ground_truth(annotations, source.annotations)
    counts = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).image_counts()
    results = evaluate_detections(truth, detections, vocabulary, counts, limit)
    results["images_per_second"] = images.num_images / seconds
    text = format_table(results)
    if official:
        results["official"] = official_lvis(annotations, detections, limit)
        text += "\n" + format_comparison(results, results["official"])
    folder = evaluation_dir(recipe.run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    reader = _image_reader(index)
    save_examples(folder, truth, detections, reader, recipe.evaluation.example_images)
    results["of"] = _identity(recipe, directory)
    write_results(recipe.run_dir, step, results, detections)
    _log(recipe, step, results)
    return text


def is_evaluated(recipe: Recipe) -> bool:
    """Whether the newest checkpoint has been evaluated as the recipe asks, last of all."""
    directory, path = newest_verified(recipe.run_dir), recipe.run_dir / "results.json"
    if directory is None or not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8")).get("of")
    return bool(found == _identity(recipe, directory))


def _identity(recipe: Recipe, directory: Path) -> dict[str, object]:
    """What figures are of: the very checkpoint, and the way that it is evaluated."""
    return {
        "checkpoint": file_digest(directory / MANIFEST)["sha256"],
        "evaluation": recipe.evaluation.model_dump(mode="json"),
    }


def _image_reader(index: Index) -> Callable[[int], bytes]:
    places: Mapping[int, int] = {int(image): i for i, image in enumerate(index.image_id)}
    return lambda image_id: index.read(places[image_id]).image


def _log(recipe: Recipe, step: int, results: Results) -> None:
    event = {"event": "evaluation", "step": step} | {key: results[key] for key in AP_KEYS}
    with (recipe.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
