"""Several runs on one page: figures with their differences to the first run, curves, categories."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.report.compare_categories import category_sections
from pipeline.report.compare_curves import curves_section
from pipeline.report.compare_recipes import differences_cell, recipe_differences
from pipeline.report.compared import DISTINCT, Compared, read_runs
from pipeline.report.document import document, publish
from pipeline.report.elements import (
    DASH,
    breakable,
    difference,
    duration,
    fraction,
    legend,
    note,
    number,
    section,
    table,
)
from pipeline.report.headline import GROUPS, column_heads, protocol_of
from pipeline.report.run_data import subset_of
from pipeline.report.speed import samples_by_source, training_seconds

_COLUMNS = ("AP", "AP50", "APr", "APc", "APf")


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write one page about all `run_dirs`, the first being the reference; returns `path`.

    Raises `DataError` where a directory holds no run, `StorageError` where `path` cannot be
    written.
    """
    return publish(path, render_comparison(read_runs(run_dirs)))


def render_comparison(runs: Sequence[Compared]) -> str:
    """The whole page as text."""
    first = runs[0]
    name = "Comparison of " + (f"{len(runs)} runs" if len(runs) > 1 else first.label)
    shown = legend([(one.label, one.style) for one in runs])
    if len(runs) > DISTINCT:
        shown += note(
            f"Colours and dashes repeat after {DISTINCT} runs, which are therefore numbered; the "
            "words beside the pointer say whose a line is."
        )
    notes = "".join(note(f"{one.label}: {text}") for one in runs for text in one.run.notes)
    return document(
        name,
        f"Differences are to the first run, {first.label}." if len(runs) > 1 else "",
        f'<div class="status">{shown}</div>{notes}',
        "".join(
            [
                section("Average precision", _cards(runs), _obstacles(runs), _measured(runs)),
                section("Runs", _table(runs)),
                curves_section(runs),
                category_sections(runs),
            ]
        ),
    )


def change(first: Compared, other: Compared, key: str) -> float | None:
    """How much higher a figure is than in the first run; None where that would mean nothing."""
    before, after = number(first.figure(key)), number(other.figure(key))
    if other is first or other.obstacles or before is None or after is None:
        return None
    return after - before


def _cards(runs: Sequence[Compared]) -> str:
    """One card for each group of categories, with a line for each run."""
    first = runs[0]
    what = {"all": "all categories"}
    cards = []
    for key, style in GROUPS:
        lines = "".join(
            f'<tr><td><i class="run {one.style}"></i><span>{escape(one.label)}</span></td>'
            f'<td class="value">{fraction(one.figure(key))}</td>'
            f"<td>{_change_words(first, one, key)}</td></tr>"
            for one in runs
        )
        cards.append(
            f'<div class="card {style}"><span class="key">{key}</span>'
            f'<span class="what">{what.get(style, style)}</span>'
            f'<table class="against">{lines}</table></div>'
        )
    return f'<div class="cards many">{"".join(cards)}</div>'


def _change_words(first: Compared, other: Compared, key: str) -> str:
    if other is first:
        return '<span class="same">first</span>'
    return difference(change(first, other, key))


def _obstacles(runs: Sequence[Compared]) -> str:
    return "".join(
        f'<p class="warning"><b>{escape(one.label)} is not comparable with the first run:</b> '
        f"{escape('; '.join(one.obstacles))}. Its differences are not shown.</p>"
        for one in runs
        if one.obstacles
    )


def _measured(runs: Sequence[Compared]) -> str:
    """What each figure is a figure of."""
    rows = []
    for one in runs:
        result = one.run.result
        if result is None:
            rows.append([_name(one), DASH, "not evaluated", ""])
            continue
        sentence = protocol_of(result) or "protocol not recorded"
        subset = subset_of(result)
        if subset:
            sentence += f" (only {subset})"
        words = "not comparable" if one.obstacles else "comparable"
        rows.append(
            [
                _name(one),
                f"{result['step']:,}",
                escape(sentence),
                "first" if one is runs[0] else words,
            ]
        )
    return table(["run", "at step", "protocol", ""], rows, "names protocols")


def _name(one: Compared) -> str:
    label = f"<span>{breakable(one.label)}</span>"
    return f'<span class="named"><i class="run {one.style}"></i>{label}</span>'


def _table(runs: Sequence[Compared]) -> str:
    """One row for each run: what is different about it, its figures, and what it cost."""
    first = runs[0]
    heads = ["run", "different from the first in", *column_heads(_COLUMNS)]
    rows = []
    for one in runs:
        samples = sum(samples_by_source(one.run)[1].values())
        seconds = training_seconds(one.run.steps)
        figures = []
        for key in _COLUMNS:
            detail = "" if one is first else difference(change(first, one, key))
            figures.append(f'{fraction(one.figure(key))}<span class="detail">{detail}</span>')
        rows.append(
            [
                _name(one),
                _different(first, one),
                *figures,
                f"{one.run.steps[-1]['step']:,}" if one.run.steps else DASH,
                f"{samples:,}" if samples else DASH,
                duration(seconds) if seconds else DASH,
            ]
        )
    return table([*heads, "steps", "samples", "time in steps"], rows, "names runs")


def _different(first: Compared, other: Compared) -> str:
    if other is first:
        return '<span class="same">the first run</span>'
    if first.run.recipe is None or other.run.recipe is None:
        whose = "its" if other.run.recipe is None else "the first run's"
        return f'<span class="same">{whose} recipe could not be read</span>'
    return differences_cell(recipe_differences(first.run.recipe, other.run.recipe))
