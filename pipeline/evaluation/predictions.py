"""Folders of photographs in, pictures with boxes and one json of all detections out."""

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.data.images import EXTENSIONS, decode_image
from pipeline.data.vocabulary import Category
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.pictures import LabelledBox, draw_boxes
from pipeline.evaluation.predict import LoadedDetector, load_detector
from pipeline.progress import Progress
from pipeline.training.locate import Checkpoint
from pipeline.training.manifest import read_manifest, write_atomically

PREDICTIONS = "predictions.json"
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
    """Write a picture for each image and `predictions.json` into `folder`.

    Boxes there are xywh in pixels of the image as people see it (EXIF applied), rows are those of
    a COCO result with `name` and `frequency` added. `image_id` is the number that the file is
    named by, as in COCO, where all files are, else the place in the list from 1 on. Images that
    cannot be read are listed. `categories` are the names to look for, all by default. `progress`
    gets (images done, images in all). Raises `RecipeError` for an unknown name, and for a folder
    that holds the images themselves, or files that are not predictions.
    """
    if categories is not None:
        detector = detector.only(categories)
    _refuse_folder(folder, images)
    folder.mkdir(parents=True, exist_ok=True)
    image_ids = _image_ids(images)
    names = _picture_names(images)
    best_score = 0.0
    entries: list[dict[str, Any]] = []
    unreadable: list[tuple[Path, str]] = []
    for done, (path, image_id, name) in enumerate(zip(images, image_ids, names, strict=True), 1):
        try:
            photograph = decode_image(_read(path))
        except DataError as error:
            unreadable.append((path, str(error)))
        else:
            [found] = detector.predict([photograph], top_k=top_k)
            best_score = max([best_score, *found.score[:1].tolist()])
            rows = list(_rows(found, detector, image_id, score_threshold))
            _save_picture(draw_boxes(photograph, [_labelled(row) for row in rows]), folder / name)
            size = {"width": photograph.width, "height": photograph.height}
            head = {"file": str(path), "picture": name, "image_id": image_id}
            entries.append({**head, **size, "detections": rows})
        if progress is not None:
            progress(done, len(images))
    tree = {
        "checkpoint": str(detector.directory),
        "step": read_manifest(detector.directory).step,
        "score_threshold": score_threshold,
        "top_k": top_k,
        "categories": None if categories is None else detector.vocabulary.names,
        "images": entries,
        "unreadable": [{"file": str(path), "reason": reason} for path, reason in unreadable],
    }
    write_atomically(folder / PREDICTIONS, json.dumps(tree, indent=1, allow_nan=False) + "\n")
    num_detections = sum(len(entry["detections"]) for entry in entries)
    return Summary(folder, len(entries), num_detections, best_score, unreadable)


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
        f"{summary.num_images:,} {'image' if summary.num_images == 1 else 'images'}, "
        f"{summary.num_detections:,} detections with score {score_threshold:g} or more: "
        f"{folder / PREDICTIONS}"
    )
    if summary.num_images and not summary.num_detections:
        print(f"the best score was {summary.best_score:.3f}; see more with --score-threshold")
    if summary.unreadable:
        listed = "; ".join(f"{path}: {reason}" for path, reason in summary.unreadable[:10])
        more = len(summary.unreadable) - 10
        listed += f"; and {more} more, all listed in {folder / PREDICTIONS}" if more > 0 else ""
        raise DataError(
            f"{len(summary.unreadable)} of {len(found.images)} images could not be read and were "
            f"left out ({listed}); the others are in {folder}"
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


def _labelled(row: dict[str, Any]) -> LabelledBox:
    x, y, width, height = row["bbox"]
    return LabelledBox(row["name"], row["frequency"], row["score"], (x, y, width, height))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror or error})") from error


def _save_picture(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path, format="JPEG", quality=90)
    except OSError as error:
        raise StorageError(f"picture {path} could not be written: {error}") from error


def _refuse_folder(folder: Path, images: Sequence[Path]) -> None:
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"-o {folder} is a file; name a folder for the pictures")
    if any(path.resolve().parent == folder.resolve() for path in images):
        raise RecipeError(
            f"-o {folder} holds images that are looked at, which pictures would replace; name "
            "another folder"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PREDICTIONS).exists():
        raise RecipeError(
            f"-o {folder} holds files and no {PREDICTIONS}, so it is not a folder of predictions; "
            "name a new folder"
        )


def _image_ids(images: Sequence[Path]) -> list[int]:
    """Numbers that the files are named by, where all are and they differ; else 1, 2, 3, ..."""
    stems = [path.stem for path in images]
    numbers = [int(stem) for stem in stems if stem.isdecimal() and stem.isascii()]
    if len(set(numbers)) == len(images) and max(numbers) < 2**63:
        return numbers
    return list(range(1, len(images) + 1))


def _picture_names(images: Sequence[Path]) -> list[str]:
    """`STEM.jpg` for each, with a number where another image has the same."""
    stems = {path.stem.casefold() for path in images}
    names: list[str] = []
    taken: set[str] = set()
    for path in images:
        stem, number = path.stem, 1
        while stem.casefold() in taken or (number > 1 and stem.casefold() in stems):
            number += 1
            stem = f"{path.stem}_{number}"
        taken.add(stem.casefold())
        names.append(f"{stem}.jpg")
    return names


def _left_out(inside: Sequence[Path]) -> str:
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in inside)
    others = [(name, count) for name, count in suffixes.items() if name not in IMAGE_SUFFIXES]
    total = sum(count for _, count in others)
    listed = ", ".join(name for name, _ in sorted(others)[:6])
    return f"{total} {'file' if total == 1 else 'files'} ({listed})"
