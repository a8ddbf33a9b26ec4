"""Detections of a whole data set as arrays, and their LVIS (COCO) result json."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.ground_truth import integers, numbers, read_json, refuse

_PIECE_CHARACTERS = 1 << 24
_SEAM = re.compile(r"\}\s*,\s*\{")


@dataclass(frozen=True, slots=True)
class Detections:
    """One row a detection, best first within an image where a detector made them.

    `image_id` and `category_id` are (N,) int64 ids of the data set, `bbox` (N, 4) float64 xywh in
    pixels of the photograph, `score` (N,) float64 in [0, 1]. `images` names every image that the
    detector saw, those without a detection included; None means all images of the annotations.
    """

    image_id: NDArray[np.int64]
    category_id: NDArray[np.int64]
    bbox: NDArray[np.float64]
    score: NDArray[np.float64]
    images: NDArray[np.int64] | None = field(default=None)

    def __post_init__(self) -> None:
        assert self.bbox.shape == (len(self), 4) and len(self.category_id) == len(self)
        outside = ~((self.score >= 0) & (self.score <= 1))
        entries = self._entries(outside, self.score)
        refuse(outside, entries, "has a score outside [0, 1]", "detections")
        negative = (self.bbox[:, 2] < 0) | (self.bbox[:, 3] < 0)
        entries = self._entries(negative, self.bbox)
        refuse(negative, entries, "has a box of negative size (bbox is x, y, w, h)", "detections")

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

    def save(self, path: Path) -> None:
        """Write an LVIS result json, complete or not at all."""
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write("[")
            for position, row in enumerate(self.to_rows()):
                file.write((",\n" if position else "\n") + json.dumps(row, allow_nan=False))
            file.write("\n]\n")
        os.replace(partial, path)


def load_detections(path: str | Path) -> Detections:
    """Read an LVIS or COCO result json; a violated rule is a `DataError` that names the file.

    It is read in pieces: millions of entries as Python objects would take many times the memory of
    the arrays that they become.
    """
    path = Path(path)
    try:
        parts = [_columns(rows, str(path)) for rows in _pieces(path)]
        return Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    except (DataError, OSError, ValueError):
        # Read whole, it gives the error of the whole file: with the number of all bad entries.
        rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: detections are a json list of image_id, category_id, bbox and score, this is "
            f"a {type(rows).__name__}; were annotations and detections swapped?"
        )
    return parse_detections(rows, str(path))


def _pieces(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The entries of a json list in the file's order, some at a time; `ValueError` if it is not."""
    with path.open(encoding="utf-8") as file:
        rest = file.read(_PIECE_CHARACTERS).lstrip()
        if not rest.startswith("["):
            raise ValueError("no json list")
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
            yield rows
        yield json.loads("[" + rest)


def _last_seam(text: str) -> re.Match[str] | None:
    """The last place where one object ends and the next begins."""
    end = len(text)
    while (end := text.rfind("}", 0, end)) >= 0:
        if seam := _SEAM.match(text, end):
            return seam
    return None


def _columns(rows: Sequence[dict[str, Any]], origin: str) -> tuple[NDArray[Any], ...]:
    return (
        integers(rows, "image_id", origin),
        integers(rows, "category_id", origin),
        numbers(rows, "bbox", origin, width=4),
        numbers(rows, "score", origin),
    )


def parse_detections(rows: Sequence[dict[str, Any]], origin: str = "detections") -> Detections:
    """Entries of a result json as arrays; a violated rule is a `DataError`."""
    return Detections(*_columns(rows, origin))


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
