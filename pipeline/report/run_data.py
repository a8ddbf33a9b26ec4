"""What a run directory says about its run: recipe, steps, evaluations, example pictures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.report.elements import number, whole
from pipeline.report.stored import UNREADABLE, Evaluation, read_evaluation, read_mapping

Event = dict[str, Any]


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
        if (evaluation := read_evaluation(folder, notes)) is not None
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
        return read_mapping(path)
    except UNREADABLE as error:
        notes.append(f"environment.json could not be read ({error}).")
        return {}


def _read_metrics(path: Path, notes: list[str]) -> list[Event]:
    if not path.is_file():
        notes.append("There is no metrics.jsonl yet.")
        return []
    events, unreadable, without_step = [], 0, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            # The last line of a run that is still going, or that was killed, may be cut off.
            unreadable += 1
            continue
        if isinstance(event, dict) and whole(event.get("step")) is not None:
            events.append(event)
        else:
            without_step += 1
    if unreadable:
        notes.append(f"Incomplete lines of metrics.jsonl that were left out: {unreadable}.")
    if without_step:
        notes.append(f"Lines of metrics.jsonl without a step that were left out: {without_step}.")
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


def points(events: list[Event], key: str) -> list[tuple[float, float]]:
    """(step, value) of the events that have a finite number under `key`."""
    values = [(float(event["step"]), number(event.get(key))) for event in events]
    return [(step, value) for step, value in values if value is not None]
