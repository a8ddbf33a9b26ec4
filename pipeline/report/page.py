"""The report of a run: one page that opens from disk and needs no network."""

import os
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from pipeline.report.accuracy import bar_of_sizes, categories_section, groups_section, headline
from pipeline.report.elements import duration
from pipeline.report.examples import examples_section
from pipeline.report.losses import losses_section
from pipeline.report.run_data import RunData, read_run
from pipeline.report.speed import speed_section, training_seconds


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory, out of what lies there; returns its path.

    Works for a run that is still going and for one that has no evaluation. Raises `DataError`
    where the directory holds no run.
    """
    run = read_run(Path(run_dir))
    path = Path(run_dir) / "report.html"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(run), encoding="utf-8")
    os.replace(partial, path)
    return path


def render(run: RunData) -> str:
    """The whole page as text."""
    template = Template(
        resources.files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    groups = f'<div class="grid2">{groups_section(run)}{bar_of_sizes(run)}</div>'
    return template.substitute(
        title=escape(f"{run.name} - longtail"),
        name=escape(run.name),
        description=escape(run.recipe.description if run.recipe else ""),
        status=_status(run),
        facts=_facts(run),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in run.notes),
        body="".join(
            [
                headline(run),
                groups if run.curve else "",
                categories_section(run),
                examples_section(run),
                losses_section(run),
                speed_section(run),
                _recipe(run),
            ]
        ),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _status(run: RunData) -> str:
    step = run.steps[-1]["step"] if run.steps else 0
    if run.recipe is None:
        return f"step {step:,}"
    planned = run.recipe.training.steps
    if step >= planned:
        return f'<span class="done">complete</span> {planned:,} steps'
    return f'<span class="going">not finished</span> step {step:,} of {planned:,}'


def _facts(run: RunData) -> str:
    facts: list[tuple[str, str]] = []
    seconds = training_seconds(run.steps)
    if seconds:
        facts.append(("time in training steps", duration(seconds)))
    if run.recipe is not None:
        recipe = run.recipe
        semantic = "off" if recipe.semantic is None else f"weight {recipe.semantic.weight:g}"
        facts += [
            ("global batch", str(recipe.training.batch_size)),
            ("detector", f"{recipe.detector.kind}, {recipe.detector.backbone.name}"),
            ("semantic branch", semantic),
            ("starts from", recipe.initialize_from or "-"),
            ("seed", str(recipe.seed)),
            ("recipe", recipe.hash()),
        ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)


def _recipe(run: RunData) -> str:
    if run.recipe is None:
        return ""
    text = escape(run.recipe.to_yaml())
    summary = "<summary>The complete recipe</summary>"
    return f"<section><details>{summary}<pre>{text}</pre></details></section>"
