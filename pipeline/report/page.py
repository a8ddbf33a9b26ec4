"""The report of a run: one page that opens from disk and needs no network."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from pipeline.report.accuracy import accuracy_section
from pipeline.report.categories import categories_section
from pipeline.report.consumed import consumed_section
from pipeline.report.curves import curves_section
from pipeline.report.document import document, publish
from pipeline.report.elements import duration, facts, folded, note, number
from pipeline.report.environment import environment_section
from pipeline.report.examples import examples_section
from pipeline.report.headline import headline
from pipeline.report.losses import losses_section
from pipeline.report.run_data import RunData, read_run
from pipeline.report.speed import speed_section, training_seconds


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write the page of a run to `path`, by default `report.html` in the run; returns its path.

    Works for a run that is still going and for one that has no evaluation. Raises `DataError`
    where the directory holds no run, `StorageError` where the page cannot be written.
    """
    run = read_run(Path(run_dir))
    return publish(path or Path(run_dir) / "report.html", render(run))


def render(run: RunData) -> str:
    """The whole page as text."""
    sections = [
        headline(run),
        accuracy_section(run),
        categories_section(run),
        curves_section(run),
        examples_section(run),
        losses_section(run),
        speed_section(run),
        consumed_section(run),
        environment_section(run),
        _recipe(run),
    ]
    return document(
        run.name,
        run.recipe.description if run.recipe else "",
        f'<div class="status">{_status(run)}</div>{facts(_facts(run))}'
        + "".join(note(text) for text in run.notes),
        "".join(sections),
    )


def _status(run: RunData) -> str:
    step = run.steps[-1]["step"] if run.steps else 0
    if run.recipe is None:
        return f"step {step:,}"
    planned = run.recipe.training.steps
    if step >= planned:
        return f'<span class="done">complete</span> {planned:,} steps'
    return f'<span class="going">not finished</span> step {step:,} of {planned:,}'


def _facts(run: RunData) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    seconds = training_seconds(run.steps)
    if seconds:
        pairs.append(("time in training steps", duration(seconds)))
    if run.steps:
        last = run.steps[-1]
        pairs.append(("optimiser steps", f"{last['step']:,}"))
        epochs = last.get("epochs")
        if isinstance(epochs, Mapping):
            passes = ((name, number(value)) for name, value in sorted(epochs.items()))
            text = ", ".join(
                f"{value:.2f} of {name}" for name, value in passes if value is not None
            )
            pairs.append(("epochs", text or "-"))
    if run.recipe is not None:
        recipe = run.recipe
        semantic = "off" if recipe.semantic is None else f"weight {recipe.semantic.weight:g}"
        pairs += [
            ("global batch", str(recipe.training.batch_size)),
            ("detector", f"{recipe.detector.kind}, {recipe.detector.backbone.name}"),
            ("semantic branch", semantic),
            ("starts from", recipe.initialize_from or "-"),
            ("seed", str(recipe.seed)),
            ("recipe", recipe.hash()),
        ]
    return pairs


def _recipe(run: RunData) -> str:
    if run.recipe is None:
        return ""
    text = f"<pre>{escape(run.recipe.to_yaml())}</pre>"
    return f"<section>{folded('The complete recipe', text)}</section>"
