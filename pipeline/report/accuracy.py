"""AP over steps, by frequency group, object size and IoU threshold."""

import math
from collections.abc import Sequence

from pipeline.report.charts import Series, bar_chart, line_chart
from pipeline.report.elements import figure, grid, legend, note, number
from pipeline.report.headline import GROUPS, protocol_of
from pipeline.report.run_data import Event, RunData, points, subset_of


def accuracy_section(run: RunData) -> str:
    """By frequency group over steps, or as bars where there is one evaluation; by size and IoU."""
    if run.result is None:
        return ""
    sizes = _bars(run.result, ("APs", "APm", "APl", "AP50", "AP75"))
    return grid(_groups(run), figure("By size of the object and by IoU", sizes))


def comparable_curves(curve: Sequence[Event]) -> list[tuple[str, list[Event]]]:
    """Evaluations that a line may join: same images, same protocol.

    The first group, labelled "", is that of all images under the newest protocol, and empty where
    every evaluation was on a subset. The others carry what sets them apart. An evaluation that did
    not record its protocol is taken to be under the newest recorded one of the same images.
    """
    newest: dict[str, str] = {}
    for event in curve:
        subset = subset_of(event) or ""
        newest[subset] = protocol_of(event) or newest.get(subset, "")
    groups: dict[tuple[str, str], list[Event]] = {}
    for event in reversed(curve):
        subset = subset_of(event) or ""
        groups.setdefault((subset, protocol_of(event) or newest[subset]), []).insert(0, event)
    main: tuple[str, list[Event]] = ("", [])
    apart = []
    for (subset, protocol), events in groups.items():
        if not subset and not main[1]:
            main = ("", events)
        else:
            apart.append((subset or protocol or "protocol not recorded", events))
    return [main, *apart]


def top_of(series: Sequence[Series]) -> float:
    """A round upper end of an AP axis for these lines."""
    values = [value for one in series for _, value in one.points]
    top = math.ceil(max(values, default=0.0) * 10 + 1e-9) / 10 + 0.02
    return max(min(1.0, top), 0.1)


def _groups(run: RunData) -> str:
    title = "By frequency of the category"
    if len(run.curve) == 1:
        return figure(title, _bars(run.curve[0], ("APr", "APc", "APf", "AP")))
    groups = comparable_curves(run.curve)
    series = [
        Series(f"{key}, {label}" if label else key, style + (" hollow" if label else ""), values)
        for label, events in groups
        for key, style in (*GROUPS[1:], GROUPS[0])
        if (values := points(events, key))
    ]
    chart = line_chart(
        series, "AP by frequency group over steps", y_range=(0.0, top_of(series)), dots=True
    )
    filled = {one.style.split()[0] for one in series}
    shown = [(key, style) for key, style in (*GROUPS[1:], GROUPS[0]) if style in filled]
    apart = [label for label, events in groups[1:] if any(points(events, k) for k, _ in GROUPS)]
    shown += [(label, "plain hollow") for label in apart]
    text = note("Hollow: other images or another protocol, not comparable.")
    return figure(title, legend(shown), text if apart else "", chart)


def _bars(result: Event, keys: Sequence[str]) -> str:
    styles = {key: style for key, style in GROUPS}
    bars = [(key, styles.get(key, "plain"), number(result.get(key))) for key in keys]
    grouped = keys[0] == "APr"
    return bar_chart(bars, "AP by frequency group" if grouped else "AP by size and IoU")
