"""Folders of photographs in, pictures with boxes and json of all detections out."""

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.data.images import EXTENSIONS, read_image
from pipeline.data.vocabulary.categories import Category
from pipeline.errors import DataError, RecipeError
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.predict import LoadedDetector, load_detector
from pipeline.evaluation.prediction_folder import PREDICTIONS, PredictionFolder
from pipeline.progress import Progress
from pipeline.training.locate import Checkpoint
from pipeline.training.manifest import read_manifest

IMAGE_SUFFIXES = {f".{extension}" for extension in EXTENSIONS.values()} | {".jpeg", ".jpe", ".mpo"}
_WILDCARDS = "*?["


@dataclass(frozen=True)
class Found:
    """Image files in order, each once, and notes on what lies beside them and is left out."""

    images: list[Path]
    notes: list[str]


@dataclass(frozen=True)
class Summary:
    """What `predict_files` did; `unreadable` has (file, reason), `best_score` is of all images."""

    folder: Path
    num_images: int
    num_detections: int
    best_score: float
    unreadable: list[tuple[Path, str]]


def find_images(words: Sequence[str]) -> Found:
    """Image files that are named by path, folder (its own files, by suffix) or glob.

    Raises `DataError` for a path that does not exist, and when there is no image at all.
    """
    images: dict[Path, Path] = {}
    notes = []
    for word in words:
        place = Path(word)
        if place.is_dir():
            inside = sorted(path for path in place.iterdir() if path.is_file())
            chosen = [path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES]
            if len(chosen) < len(inside):
                notes.append(f"{place}: {_left_out(inside)} left out, not images by their names")
            if not chosen and any(path.is_dir() for path in place.iterdir()):
                notes.append(f"{place}: has folders inside; name them, or '{place}/**/*.jpg'")
        elif place.exists():
            chosen = [place]
        elif any(letter in word for letter in _WILDCARDS):
            matches = sorted(glob.glob(word, recursive=True))
            chosen = [path for path in map(Path, matches) if path.is_file()]
        else:
            raise DataError(f"image {word} does not exist; give image files, folders or globs")
        for path in chosen:
            images.setdefault(path.resolve(), path)
    if not images:
        reasons = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(
            f"no image found in {' '.join(map(str, words))}{reasons}; give files, folders that "
            f"hold {', '.join(sorted(IMAGE_SUFFIXES))}, or globs"
        )
    return Found(list(images.values()), notes)


def predict_files(
    detector: LoadedDetector,
    images: Sequence[Path],
    folder: Path,
    *,
    score_threshold: float,
    top_k: int,
    categories: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write a picture for each image, `predictions.json` and `detections.json` into `folder`.

    Boxes there are xywh in pixels of the image as people see it (EXIF applied), rows are those of
    a COCO result, in `predictions.json` with `name` and `frequency` added. `image_id` is the number
    that the file is named by, as in COCO, where all files are, else the place in the list from 1
    on. Images that cannot be read are listed. What an earlier run wrote there is removed first.
    `categories` are the names to look for, all by default. `progress` gets (images done, images in
    all). Raises `RecipeError` for an unknown name, and for a folder that holds the images
    themselves, or files that are not predictions; `StorageError` where it cannot be written.
    """
    if categories is not None:
        detector = detector.only(categories)
    head = {
        "checkpoint": str(detector.directory),
        "step": read_manifest(detector.directory).step,
        "score_threshold": score_threshold,
        "top_k": top_k,
        "categories": None if categories is None else detector.vocabulary.names,
    }
    output = PredictionFolder(folder, head, images)
    best_score = 0.0
    for done, place in enumerate(output.places, 1):
        try:
            photograph = read_image(place.file)
        except DataError as error:
            output.leave_out(place, str(error))
        else:
            [found] = detector.predict([photograph], top_k=top_k)
            best_score = max([best_score, *found.score[:1].tolist()])
            rows = list(_rows(found, detector, place.image_id, score_threshold))
            output.add(place, photograph, rows)
        if progress is not None:
            progress(done, len(images))
    output.finish()
    num_detections = sum(len(entry["detections"]) for entry in output.entries)
    return Summary(folder, len(output.entries), num_detections, best_score, output.unreadable)


def predict_stage(
    checkpoint: Checkpoint,
    words: Sequence[str],
    folder: Path,
    *,
    score_threshold: float,
    top_k: int,
    categories: Sequence[str] | None = None,
    device: str | None = None,
) -> None:
    """`longtail predict`: the named images through a checkpoint, with progress and a summary.

    `device` is a GPU by default where there is one. Raises `DataError` at the end, with all others
    written, when images could not be read.
    """
    if not 0 <= score_threshold <= 1:
        raise RecipeError(f"--score-threshold {score_threshold} must be between 0 and 1")
    if top_k < 1:
        raise RecipeError(f"--top-k {top_k} must be 1 or more")
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch finds no GPU here; leave it out, or give cpu")
    found = find_images(words)
    for note in found.notes:
        print(note)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    detector = load_detector(checkpoint, device=device)
    with Progress("predicting", "images") as progress:
        summary = predict_files(
            detector,
            found.images,
            folder,
            score_threshold=score_threshold,
            top_k=top_k,
            categories=categories,
            progress=progress.update,
        )
    print(
        f"{_counted(summary.num_images, 'image')}, {_counted(summary.num_detections, 'detection')} "
        f"with score {score_threshold:g} or more: {folder / PREDICTIONS}"
    )
    if summary.num_images and not summary.num_detections:
        print(f"the best score was {summary.best_score:.3f}; see more with --score-threshold")
    if summary.unreadable:
        listed = "; ".join(f"{path}: {reason}" for path, reason in summary.unreadable[:10])
        more = len(summary.unreadable) - 10
        listed += f"; and {more} more, all listed in {folder / PREDICTIONS}" if more > 0 else ""
        raise DataError(
            f"{len(summary.unreadable)} of {_counted(len(found.images), 'image')} could not be "
            f"read ({listed}); all others are in {folder}"
        )


def _rows(
    found: Detections, detector: LoadedDetector, image_id: int, score_threshold: float
) -> Iterator[dict[str, Any]]:
    vocabulary = detector.vocabulary
    for row in found.to_rows():
        if row["score"] < score_threshold:
            continue
        category: Category = vocabulary.categories[vocabulary.column_of(row["category_id"])]
        yield {
            "image_id": image_id,
            "category_id": category.id,
            "name": category.name,
            "frequency": category.frequency,
            "score": round(row["score"], 6),
            "bbox": [round(value, 3) for value in row["bbox"]],
        }


def _left_out(inside: Sequence[Path]) -> str:
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in inside)
    others = [(name, count) for name, count in suffixes.items() if name not in IMAGE_SUFFIXES]
    total = sum(count for _, count in others)
    listed = ", ".join(name for name, _ in sorted(others)[:6])
    return f"{_counted(total, 'file')} ({listed})"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
