"""What a run directory says about its run: recipe, steps, evaluations, example pictures."""

import base64
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.report.elements import number

Event = dict[str, Any]


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
class Example:
    """A picture of the data set as a data URL, with the boxes that examples.json has for it."""

    image_id: int
    url: str
    width: int
    height: int
    ground_truth: list[dict[str, Any]]
    detections: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One directory of evaluations/."""

    step: int
    results: dict[str, Any]
    categories: list[CategoryRow]
    examples: list[Example]
    curves: dict[str, Any]
    """curves.json: precision over recall; empty where it was not written."""


@dataclass(frozen=True, slots=True)
class RunData:
    """A run, finished or not. `steps` and `evaluations` ascend by step, each step once.

    `curve` holds the figures of every evaluation, logged or stored, those on a subset of the images
    too. `recipe` is None where recipe.yaml is missing or of another version; `notes` say so, and
    name whatever else could not be read.
    """

    name: str
    recipe: Recipe | None
    steps: list[Event]
    curve: list[Event]
    evaluations: list[Evaluation]
    environment: dict[str, Any]
    notes: list[str]

    @property
    def result(self) -> Event | None:
        """The last evaluation of all images; the last one on a subset where there is no other."""
        full = [event for event in self.curve if subset_of(event) is None]
        return next(reversed(full or self.curve), None)

    @property
    def shown(self) -> Evaluation | None:
        """The stored evaluation that categories and pictures are shown of, chosen likewise."""
        full = [one for one in self.evaluations if subset_of(one.results) is None]
        return next(reversed(full or self.evaluations), None)


def subset_of(results: Event) -> str | None:
    """`n of m images` where figures are of a part of the validation images, else None."""
    subset = results.get("subset")
    if isinstance(subset, str) and subset:
        return subset
    counts = results.get("counts")
    if not isinstance(counts, dict):
        return None
    images, annotated = counts.get("images"), counts.get("images_annotated")
    if isinstance(images, int) and isinstance(annotated, int) and images < annotated:
        return f"{images:,} of {annotated:,} images"
    return None


def read_run(run_dir: Path) -> RunData:
    """Read everything that the report shows; raises `DataError` where there is no run at all."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} does not exist; give the directory of a run")
    notes: list[str] = []
    events = _read_metrics(run_dir / "metrics.jsonl", notes)
    evaluations = [
        evaluation
        for folder in sorted(run_dir.glob("evaluations/step_*"))
        if (evaluation := _read_evaluation(folder, notes)) is not None
    ]
    recipe = _read_recipe(run_dir / "recipe.yaml", notes)
    if not events and not evaluations and recipe is None:
        raise DataError(f"{run_dir} has neither recipe.yaml nor metrics.jsonl nor evaluations/")
    return RunData(
        name=recipe.name if recipe else run_dir.name,
        recipe=recipe,
        steps=_by_step(events, "step"),
        curve=_evaluation_curve(events, evaluations),
        evaluations=evaluations,
        environment=_read_environment(run_dir / "environment.json", notes),
        notes=notes,
    )


def _read_recipe(path: Path, notes: list[str]) -> Recipe | None:
    try:
        return load_recipe(path)
    except RecipeError as error:
        notes.append(f"The recipe is not shown: {error}.")
        return None


def _read_environment(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _mapping(path)
    except (OSError, ValueError) as error:
        notes.append(f"environment.json could not be read ({error}).")
        return {}


def _mapping(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"a mapping is expected, this is {type(tree).__name__}")
    return tree


def _read_metrics(path: Path, notes: list[str]) -> list[Event]:
    if not path.is_file():
        notes.append("There is no metrics.jsonl yet.")
        return []
    events, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            # The last line of a run that is still going, or that was killed, may be cut off.
            unreadable += 1
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    if unreadable:
        notes.append(f"Incomplete lines of metrics.jsonl that were left out: {unreadable}.")
    return events


def _by_step(events: list[Event], kind: str) -> list[Event]:
    """Events of one kind; where a resumed run repeated a step, its last word counts."""
    latest = {event["step"]: event for event in events if event.get("event") == kind}
    return [latest[step] for step in sorted(latest)]


def _evaluation_curve(events: list[Event], evaluations: list[Evaluation]) -> list[Event]:
    """Every evaluation once. What was logged and what was stored of one are put together; an
    evaluation on a subset stands beside one of all images at the same step."""
    merged: dict[tuple[int, str], Event] = {}
    logged = [event for event in events if event.get("event") == "evaluation"]
    stored = [{**evaluation.results, "step": evaluation.step} for evaluation in evaluations]
    for event in [*logged, *stored]:
        subset = event.get("subset")
        key = (event["step"], subset.replace(",", "") if isinstance(subset, str) else "")
        merged[key] = {**merged.get(key, {}), **event, "event": "evaluation"}
    return [merged[key] for key in sorted(merged)]


def _read_evaluation(folder: Path, notes: list[str]) -> Evaluation | None:
    path = folder / "results.json"
    if not path.is_file():
        return None  # results.json is written last: this evaluation is still going
    try:
        results = _mapping(path)
        return Evaluation(
            step=int(results["step"]),
            results=results,
            categories=_read_categories(folder),
            examples=_read_examples(folder),
            curves=_mapping(folder / "curves.json") if (folder / "curves.json").is_file() else {},
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        notes.append(f"evaluations/{folder.name} could not be read ({error!r}).")
        return None


def _read_categories(folder: Path) -> list[CategoryRow]:
    path = folder / "per_category.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            CategoryRow(
                category_id=int(row["category_id"]),
                name=row["name"],
                frequency=row["frequency"],
                train_images=int(row["train_images"]) if row["train_images"] else None,
                instances=int(row["instances"]),
                ap=number(float(row["AP"])) if row["AP"] else None,
            )
            for row in csv.DictReader(file)
        ]


def _read_examples(folder: Path) -> list[Example]:
    path = folder / "examples.json"
    if not path.is_file():
        return []
    examples = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        picture = (folder / Path(entry["file"]).name).read_bytes()
        examples.append(
            Example(
                image_id=int(entry["image_id"]),
                url="data:image/jpeg;base64," + base64.b64encode(picture).decode("ascii"),
                width=int(entry["width"]),
                height=int(entry["height"]),
                ground_truth=entry["ground_truth"],
                detections=entry["detections"],
            )
        )
    return examples


def points(events: list[Event], key: str) -> list[tuple[float, float]]:
    """(step, value) of the events that have a finite number under `key`."""
    values = [(float(event["step"]), number(event.get(key))) for event in events]
    return [(step, value) for step, value in values if value is not None]
