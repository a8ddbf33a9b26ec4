"""Detections of a whole data set as arrays, and their LVIS (COCO) result json."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.storage.files import publish
from pipeline.errors import DataError
from pipeline.evaluation.entries import EntryError, integers, numbers, reading, refuse

Columns = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Of the entries' `_KEYS`, in this order."""
_KEYS = ("image_id", "category_id", "bbox", "score")

_PIECE_CHARACTERS = 1 << 24
_SEAM = re.compile(r"\}\s*,\s*\{")


@dataclass(frozen=True, slots=True)
class Detections:
    """One row a detection, best first within an image where a detector made them.

    `image_id` and `category_id` are (N,) int64 ids of the data set, `bbox` (N, 4) float64 xywh in
    pixels of the photograph, `score` (N,) float64 in [0, 1]. `images` names every image that the
    detector saw, those without a detection included; None means all images of the annotations.
    `origin` is what errors call them.
    """

    image_id: NDArray[np.int64]
    category_id: NDArray[np.int64]
    bbox: NDArray[np.float64]
    score: NDArray[np.float64]
    images: NDArray[np.int64] | None = None
    origin: str = "detections"

    def __post_init__(self) -> None:
        assert self.bbox.shape == (len(self), 4) and len(self.category_id) == len(self)
        outside = ~((self.score >= 0) & (self.score <= 1))
        entries = self._entries(outside, self.score)
        refuse(outside, entries, "has a score outside [0, 1]", self.origin)
        negative = (self.bbox[:, 2] < 0) | (self.bbox[:, 3] < 0)
        entries = self._entries(negative, self.bbox)
        refuse(negative, entries, "has a box of negative size (bbox is x, y, w, h)", self.origin)

    def _entries(self, bad: NDArray[np.bool_], values: NDArray[Any]) -> NDArray[Any]:
        """How the first bad entries are named in an error, in a column of all entries."""
        names = np.full(len(self), "", dtype=object)
        for row in np.flatnonzero(bad)[:3].tolist():
            value = values[row].tolist()
            names[row] = f"entry {row} (image {int(self.image_id[row])}, {value})"
        return names

    def __len__(self) -> int:
        return len(self.image_id)

    def to_rows(self) -> Iterator[dict[str, Any]]:
        """The entries of an LVIS result json."""
        columns = (self.image_id, self.category_id, self.bbox, self.score)
        for image_id, category_id, bbox, score in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            yield {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": bbox,
                "score": score,
            }

    def on_images(self, image_ids: NDArray[np.int64]) -> "Detections":
        """Those on some images, which are then all that is evaluated."""
        return replace(self._where(np.isin(self.image_id, image_ids)), images=image_ids)

    def above(self, score_threshold: float) -> "Detections":
        """Those with a score of `score_threshold` or more."""
        return self._where(self.score >= score_threshold)

    def _where(self, rows: NDArray[np.bool_]) -> "Detections":
        return replace(
            self,
            image_id=self.image_id[rows],
            category_id=self.category_id[rows],
            bbox=self.bbox[rows],
            score=self.score[rows],
        )

    def save(self, path: Path) -> None:
        """Write an LVIS result json, complete or not at all."""
        with publish(str(path)) as file:
            file.write(b"[")
            for position, row in enumerate(self.to_rows()):
                text = json.dumps(row, allow_nan=False)
                file.write(f"{',' if position else ''}\n{text}".encode())
            file.write(b"\n]\n")


def load_detections(path: str | Path) -> Detections:
    """Read an LVIS or COCO result json; a violated rule is a `DataError` that names the file.

    It is read in pieces: millions of entries as Python objects would take many times the memory of
    the arrays that they become.
    """
    path = Path(path)
    parts: list[Columns] = []
    problems: list[EntryError] = []
    first = 0
    for rows in _pieces(path):
        try:
            parts.append(_columns(rows, str(path), first))
        except EntryError as problem:
            problems.append(problem)
        first += len(rows)
    if problems:
        raise _total(problems, first)
    image_id, category_id, bbox, score = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return Detections(image_id, category_id, bbox, score, origin=str(path))


def _total(problems: Sequence[EntryError], total: int) -> EntryError:
    """The first rule, in the order of the checks, that entries of any piece break: of all pieces.

    Each piece tells of the first that it breaks itself, so that none of this rule is left out.
    """
    worst = min(problems, key=lambda one: (_KEYS.index(one.key), one.stage))
    same = [one for one in problems if (one.key, one.stage) == (worst.key, worst.stage)]
    names = [name for one in same for name in one.names]
    number = sum(one.number for one in same)
    return EntryError(worst.origin, worst.key, worst.stage, worst.rule, names, number, total)


def _pieces(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The entries of a json list in the file's order, some at a time."""
    with reading(path), path.open(encoding="utf-8-sig") as file:
        text = file.read(_PIECE_CHARACTERS)
        rest = text.lstrip()
        if rest and not rest.startswith("["):
            raise DataError(
                f"{path}: detections are a json list of image_id, category_id, bbox and score, "
                f"this begins with {rest[0]!r}; were annotations and detections swapped?"
            )
        place = len(text) - len(rest)  # of the bracket, later of what stands before `rest`
        rest = rest[1:]
        while more := file.read(_PIECE_CHARACTERS):
            rest += more
            cut = _last_seam(rest)
            if cut is None:
                continue
            try:
                rows = json.loads(f"[{rest[: cut.start() + 1]}]")
            except json.JSONDecodeError:
                continue  # Not a seam between entries, but inside of one: the next may be.
            rest = rest[cut.end() - 1 :]
            place += cut.end() - 1
            yield rows
        try:
            yield json.loads(f"[{rest}")
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} is not complete json ({error.msg} at character {place + error.pos}); "
                "write it again"
            ) from None


def _last_seam(text: str) -> re.Match[str] | None:
    """The last place where one object ends and the next begins."""
    end = len(text)
    while (end := text.rfind("}", 0, end)) >= 0:
        if seam := _SEAM.match(text, end):
            return seam
    return None


def _columns(rows: Sequence[dict[str, Any]], origin: str, first: int) -> Columns:
    return (
        integers(rows, "image_id", origin, first=first),
        integers(rows, "category_id", origin, first=first),
        numbers(rows, "bbox", origin, width=4, first=first),
        numbers(rows, "score", origin, first=first),
    )


def parse_detections(rows: Sequence[dict[str, Any]], origin: str = "detections") -> Detections:
    """Entries of a result json as arrays; a violated rule is a `DataError`."""
    image_id, category_id, bbox, score = _columns(rows, origin, 0)
    return Detections(image_id, category_id, bbox, score, origin=origin)


def concatenate(parts: Sequence[Detections]) -> Detections:
    """Detections of several ranks as one; an image that two ranks saw is a `DataError`."""
    seen = [part.images for part in parts]
    images = None
    if all(one is not None for one in seen):
        images, count = np.unique(
            np.concatenate([one for one in seen if one is not None]), return_counts=True
        )
        refuse(count > 1, images, "is an image that was detected on twice", "detections")
    return Detections(
        image_id=np.concatenate([part.image_id for part in parts]),
        category_id=np.concatenate([part.category_id for part in parts]),
        bbox=np.concatenate([part.bbox for part in parts]),
        score=np.concatenate([part.score for part in parts]),
        images=images,
    )
