"""The figures that a run is judged by: cards, every evaluation, protocols, operating point."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.report.elements import (
    count,
    facts,
    figure,
    folded,
    fraction,
    note,
    number,
    section,
    table,
)
from pipeline.report.run_data import Event, RunData, subset_of

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
GROUPS = (("AP", "all"), ("APr", "rare"), ("APc", "common"), ("APf", "frequent"))
_OPEN_ROWS = 8


def headline(run: RunData) -> str:
    """The four figures that count, large; then every evaluation, protocol and operating point."""
    result = run.result
    if result is None:
        return '<section><p class="note">This run has not been evaluated.</p></section>'
    return section(
        "Average precision",
        _cards(result),
        note(_protocol(result)),
        _evaluations(run.curve),
        _protocols(result),
        _operating_point(result),
    )


def column_heads(keys: Sequence[str]) -> list[str]:
    """Cells of a table head; the groups in their colours."""
    styles = {key: style for key, style in GROUPS if key != "AP"}
    return [f'<span class="{styles.get(key, "")}">{escape(key)}</span>' for key in keys]


def _cards(result: Event) -> str:
    what = {"all": "all categories"}
    cards = "".join(
        f'<div class="card {style}"><span class="figure">{fraction(result.get(key))}</span>'
        f'<span class="key">{key}</span><span class="what">{what.get(style, style)}</span></div>'
        for key, style in GROUPS
    )
    return f'<div class="cards">{cards}</div>'


def protocol_of(result: Mapping[str, Any]) -> str | None:
    """The sentence that says what was measured, where the evaluation recorded it."""
    text = result.get("protocol")
    return text if isinstance(text, str) and text else None


def _protocol(result: Event) -> str:
    text = f"Step {result['step']:,}. {protocol_of(result) or 'Protocol not recorded'}."
    subset = subset_of(result)
    if subset:
        text += f" Only a subset, {subset}: not comparable with figures on all images."
    counts = result.get("counts")
    if isinstance(counts, dict):
        groups = counts.get("categories_with_ground_truth")
        groups = groups if isinstance(groups, dict) else {}
        rare, common, frequent = (_shown(groups.get(key)) for key in "rcf")
        text += (
            f" {_shown(counts.get('instances'))} boxes of {_shown(groups.get('all'))} categories "
            f"({rare} rare, {common} common, {frequent} frequent) and "
            f"{_shown(counts.get('detections'))} detections."
        )
    return text + " Fractions of 1; a dash is undefined (no ground truth)."


def _shown(value: object) -> str:
    known = number(value)
    return "an unknown number of" if known is None else f"{known:,.0f}"


def _evaluations(curve: Sequence[Event]) -> str:
    """Newest first; figures on a subset say so in their first cell. Early ones are folded away."""
    recall = sorted({key for event in curve for key in event if key.startswith("AR@")})
    keys = [*COLUMNS, *recall]
    rows = []
    for event in reversed(curve):
        subset = subset_of(event)
        step = f"{event['step']:,}"
        if subset:
            step += f' <span class="subset">{escape(subset)}</span>'
        rows.append([step, *(fraction(event.get(key)) for key in keys)])
    heads = column_heads(["step", *keys])
    early = table(heads, rows[_OPEN_ROWS:], "steps")
    return table(heads, rows[:_OPEN_ROWS], "steps") + (
        folded(f"{len(rows) - _OPEN_ROWS:,} earlier evaluations", early)
        if len(rows) > _OPEN_ROWS
        else ""
    )


def _protocols(result: Event) -> str:
    """The same detections under every protocol that was counted, each row with its label."""
    found = result.get("protocols")
    if not isinstance(found, Mapping) or not found:
        return ""
    rows = []
    for name, figures in found.items():
        if not isinstance(figures, Mapping):
            continue
        sentence = protocol_of(figures) or "protocol not recorded"
        label = f"<b>{escape(_label(str(name)))}</b>"
        if sentence == protocol_of(result):
            label += " (above)"
        keys = ("AP", "AP50", "APr", "APc", "APf")
        cells = [fraction(figures.get(key)) for key in keys]
        rows.append([f'{label}<span class="detail">{escape(sentence)}</span>', *cells])
    heads = column_heads(["protocol", "AP", "AP50", "APr", "APc", "APf"])
    return figure("The same detections by protocol", table(heads, rows, "names by-protocol"))


def _label(name: str) -> str:
    if name.isdigit():
        return f"top {int(name):,} per image"
    return "fixed AP" if name == "fixed" else name


def _operating_point(result: Event) -> str:
    point: Any = result.get("operating_point")
    if not isinstance(point, Mapping):
        return ""
    pairs = [
        ("precision", fraction(point.get("precision"))),
        ("recall", fraction(point.get("recall"))),
        ("mean IoU of true positives", fraction(point.get("mean_iou"))),
        ("detections", count(point.get("detections"))),
        ("true positives", count(point.get("true_positives"))),
    ]
    score, iou = number(point.get("score_threshold")), number(point.get("iou_threshold"))
    text = (
        f"Detections that score at least {'?' if score is None else f'{score:.3f}'}; "
        f"true where they overlap an object by IoU {'?' if iou is None else f'{iou:.2f}'} or more."
    )
    return figure("Operating point", note(text), facts(pairs))
