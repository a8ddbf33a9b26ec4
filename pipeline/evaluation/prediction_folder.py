"""The folder that `longtail predict` fills: pictures, and what was found on them as json."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.errors import RecipeError, StorageError
from pipeline.evaluation.pictures import LabelledBox, draw_boxes
from pipeline.training.manifest import write_atomically

PREDICTIONS = "predictions.json"
DETECTIONS = "detections.json"
SECONDS_BETWEEN_UPDATES = 30.0
RESULT_KEYS = ("image_id", "category_id", "bbox", "score")
"""Of a COCO result."""


@dataclass(frozen=True)
class Place:
    """An image file, the number that it goes by, and the name of its picture."""

    file: Path
    image_id: int
    picture: str


class PredictionFolder:
    """Pictures, `predictions.json`, and at the end `detections.json`, a plain COCO result.

    `predictions.json` is there before the first picture and names all that are to come as
    `pending`, and `complete` is false until the end, so that the next run into the folder knows
    whose files these are and removes them. Raises `RecipeError` for a folder that holds other
    files, and `StorageError` for what cannot be written.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any], images: Sequence[Path]) -> None:
        self.folder = folder
        self.places = _places(images)
        self.entries: list[dict[str, Any]] = []
        self.unreadable: list[tuple[Path, str]] = []
        self._head = dict(head)
        with _storage_errors(folder):
            before = _pictures_before(folder, images)
            folder.mkdir(parents=True, exist_ok=True)
            for name in [*before, DETECTIONS]:
                (folder / name).unlink(missing_ok=True)
        self._update(complete=False)

    def add(self, place: Place, photograph: Image.Image, rows: list[dict[str, Any]]) -> None:
        """Draw the rows of the next image, and keep them."""
        picture = draw_boxes(photograph, [_labelled(row) for row in rows])
        path = self.folder / place.picture
        with _storage_errors(path):
            picture.save(path, format="JPEG", quality=90)
        names = {"file": str(place.file), "picture": place.picture, "image_id": place.image_id}
        size = {"width": photograph.width, "height": photograph.height}
        self.entries.append({**names, **size, "detections": rows})
        self._update_now_and_then()

    def leave_out(self, place: Place, reason: str) -> None:
        """Note why there is no picture of the next image."""
        self.unreadable.append((place.file, reason))
        self._update_now_and_then()

    def finish(self) -> None:
        """Write both json files, of all images."""
        rows = [row for entry in self.entries for row in entry["detections"]]
        results = [json.dumps({key: row[key] for key in RESULT_KEYS}) for row in rows]
        path = self.folder / DETECTIONS
        with _storage_errors(path):
            write_atomically(path, "[\n" + ",\n".join(results) + "\n]\n")
        self._update(complete=True)

    def _update_now_and_then(self) -> None:
        if time.monotonic() >= self._next_update:
            self._update(complete=False)

    def _update(self, *, complete: bool) -> None:
        begun = time.monotonic()
        pending = self.places[len(self.entries) + len(self.unreadable) :]
        tree = {
            "complete": complete,
            **self._head,
            "images": self.entries,
            "unreadable": [{"file": str(file), "reason": why} for file, why in self.unreadable],
            "pending": [{"file": str(one.file), "picture": one.picture} for one in pending],
        }
        path = self.folder / PREDICTIONS
        with _storage_errors(path):
            write_atomically(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")
        # A long file is written more seldom, so that writing stays a small part of the time.
        now = time.monotonic()
        self._next_update = now + max(SECONDS_BETWEEN_UPDATES, 20 * (now - begun))


def _labelled(row: Mapping[str, Any]) -> LabelledBox:
    x, y, width, height = row["bbox"]
    return LabelledBox(row["name"], row["frequency"], row["score"], (x, y, width, height))


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error}; free some space, or name another folder "
            "with -o, and run the command again"
        ) from error


def _pictures_before(folder: Path, images: Sequence[Path]) -> list[str]:
    """Pictures that an earlier run wrote or was about to write; refuses a folder of other files."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"-o {folder} is a file; name a folder for the pictures")
    if any(path.resolve().parent == folder.resolve() for path in images):
        raise RecipeError(
            f"-o {folder} holds images that are looked at, which pictures would replace; name "
            "another folder"
        )
    path = folder / PREDICTIONS
    if path.exists():
        return _pictures_of(path)
    half_written = path.name + ".tmp"
    if folder.is_dir() and any(inside.name != half_written for inside in folder.iterdir()):
        raise RecipeError(
            f"-o {folder} holds files and no {PREDICTIONS}, so it is not a folder of predictions; "
            "name a new folder"
        )
    return []


def _pictures_of(path: Path) -> list[str]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        pictures = [entry["picture"] for entry in [*tree["images"], *tree.get("pending", [])]]
        ours = "checkpoint" in tree and all(_is_picture(name) for name in pictures)
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise RecipeError(
            f"{path} was not written by `longtail predict` and would be replaced; name a new folder"
        )
    return pictures


def _is_picture(name: str) -> bool:
    return Path(name).name == name and name.endswith(".jpg")


def _places(images: Sequence[Path]) -> list[Place]:
    parts = zip(images, _image_ids(images), _picture_names(images), strict=True)
    return [Place(file, image_id, picture) for file, image_id, picture in parts]


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
