"""What the folder of one evaluation holds: figures, categories, example pictures, curves.

A row, picture or box that cannot be read is left out, and the notes say so.
"""

import base64
import csv
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.report.elements import number, whole

UNREADABLE = (OSError, ValueError, TypeError, KeyError, RecursionError, csv.Error)
"""What reading a damaged file, or one of another shape, raises."""
_FREQUENCIES = ("r", "c", "f")
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """One line of per_category.csv; None where a figure is undefined or not known."""

    category_id: int
    name: str
    frequency: str
    train_images: int | None
    instances: int
    ap: float | None


@dataclass(frozen=True, slots=True)
class ExampleBox:
    """A box on an example picture, xywh in its pixels; `score` is 1 for ground truth."""

    name: str
    frequency: str | None
    score: float
    bbox: tuple[float, ...]

    @property
    def is_rare(self) -> bool:
        """Of a rare category, which is drawn in red."""
        return self.frequency == "r"


@dataclass(frozen=True, slots=True)
class Example:
    """A picture of the data set as a data URL, with the boxes that examples.json has for it."""

    image_id: int
    url: str
    width: int
    height: int
    ground_truth: list[ExampleBox]
    detections: list[ExampleBox]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One directory of evaluations/."""

    step: int
    results: dict[str, Any]
    categories: list[CategoryRow]
    examples: list[Example]
    curves: dict[str, Any]
    """curves.json: precision over recall; empty where it was not written."""


def read_mapping(path: Path) -> dict[str, Any]:
    """A json object; raises one of `UNREADABLE`."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"a mapping is expected, this is {type(tree).__name__}")
    return tree


def read_evaluation(folder: Path, notes: list[str]) -> Evaluation | None:
    """An evaluation whose results.json is there and sound; of what else is damaged, the rest."""
    path = folder / "results.json"
    if not path.is_file():
        return None  # results.json is written last: this evaluation is still going
    place = f"evaluations/{folder.name}"
    try:
        results = read_mapping(path)
        step = whole(results["step"])
        if step is None:
            raise ValueError("its step is not a whole number of steps")
    except UNREADABLE as error:
        notes.append(f"{place} could not be read ({error!r}).")
        return None
    curves: dict[str, Any] = {}
    if (folder / "curves.json").is_file():
        try:
            curves = read_mapping(folder / "curves.json")
        except UNREADABLE as error:
            notes.append(f"{place}/curves.json could not be read ({error!r}).")
    left_out: Counter[str] = Counter()
    evaluation = Evaluation(
        step=step,
        results=results,
        categories=_read_categories(folder / "per_category.csv", left_out),
        examples=_read_examples(folder / "examples.json", left_out),
        curves=curves,
    )
    notes += [f"{place}/{what}: {times:,} left out." for what, times in left_out.items()]
    return evaluation


def _read_categories(path: Path, left_out: Counter[str]) -> list[CategoryRow]:
    rows: list[CategoryRow] = []
    if not path.is_file():
        return rows
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    rows.append(_category(row))
                except UNREADABLE:
                    left_out[f"{path.name}, rows that could not be read"] += 1
    except UNREADABLE as error:
        left_out[f"{path.name}, parts that could not be read ({error!r})"] += 1
    return rows


def _category(row: Mapping[str, str]) -> CategoryRow:
    train_images, ap = row["train_images"], row["AP"]
    return CategoryRow(
        category_id=_known(whole(int(row["category_id"]))),
        name=_text(row["name"]),
        frequency=_text(row["frequency"]),
        train_images=_known(whole(int(train_images))) if train_images else None,
        instances=_known(whole(int(row["instances"]))),
        ap=number(float(ap)) if ap else None,
    )


def _read_examples(path: Path, left_out: Counter[str]) -> list[Example]:
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError(f"a list is expected, this is {type(entries).__name__}")
    except UNREADABLE as error:
        left_out[f"{path.name}, parts that could not be read ({error!r})"] += 1
        return []
    examples = []
    for entry in entries:
        try:
            picture = (path.parent / Path(entry["file"]).name).read_bytes()
            example = Example(
                image_id=_known(whole(entry["image_id"])),
                url="data:image/jpeg;base64," + base64.b64encode(picture).decode("ascii"),
                width=_side(entry["width"]),
                height=_side(entry["height"]),
                ground_truth=_boxes(entry["ground_truth"], False, left_out),
                detections=_boxes(entry["detections"], True, left_out),
            )
        except UNREADABLE:
            left_out[f"{path.name}, pictures that could not be read"] += 1
            continue
        examples.append(example)
    return examples


def _boxes(entries: Any, scored: bool, left_out: Counter[str]) -> list[ExampleBox]:
    boxes = []
    for entry in entries:
        try:
            frequency = entry["frequency"]
            if frequency is not None and frequency not in _FREQUENCIES:
                raise ValueError("frequency is r, c, f or null")
            score = _known(number(entry["score"])) if scored else 1.0
            bbox = tuple(_known(number(value)) for value in entry["bbox"])
            if len(bbox) != 4:
                raise ValueError("bbox has four numbers")
            boxes.append(ExampleBox(_text(entry["name"]), frequency, score, bbox))
        except UNREADABLE:
            left_out["examples.json, boxes that could not be read"] += 1
    return boxes


def _known(value: _Number | None) -> _Number:
    if value is None:
        raise ValueError("not a number that can be drawn")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _side(value: object) -> int:
    side = _known(whole(value))
    if not 0 < side <= 100_000:
        raise ValueError("a picture is 1 to 100,000 pixels wide and high")
    return side
