"""What a study leaves: a page, a csv and a json of one name, each whole or not at all."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.document import publish
from pipeline.report.elements import DASH


@dataclass(frozen=True)
class Outcome:
    """A finished study: its name for files, its page, rows for the csv, all figures for the json,
    and lines for the terminal."""

    name: str
    page: str
    rows: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Any]
    lines: Sequence[str]


def write_outcome(folder: Path, outcome: Outcome) -> str:
    """Write NAME.html, NAME.csv and NAME.json into `folder`; the lines to print.

    Raises `StorageError` where they cannot be written.
    """
    stem = folder / outcome.name
    figures = json.dumps(outcome.figures, indent=1, allow_nan=False)
    write_csv(stem.with_name(f"{stem.name}.csv"), outcome.rows)
    publish(stem.with_name(f"{stem.name}.json"), figures + "\n")
    # The page last: where it is, the others are.
    page = publish(stem.with_name(f"{stem.name}.html"), outcome.page)
    return "\n".join([*outcome.lines, f"page  {page}, with {stem.name}.csv and .json"])


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each row under the keys of the first; None is an empty cell."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    publish(path, text.getvalue())


def percent(share: float | None) -> str:
    """A share of 1 as percent with one decimal; a dash where it is undefined."""
    return DASH if share is None else f"{100 * share:.1f}"
