"""Throughput, and where the time of a step goes."""

from statistics import median

from pipeline.report.charts import Series, line_chart, share_bar
from pipeline.report.elements import duration, figure, section, table
from pipeline.report.run_data import Event, RunData, points

_WAITS = (("data_wait", "waiting for data", "c2"), ("teacher_wait", "waiting for teacher", "c3"))


def speed_section(run: RunData) -> str:
    """Images a second over steps, the shares of data, teacher and compute, samples by source."""
    rates = points(run.steps, "images_per_second")
    if not rates and not any("seconds" in event for event in run.steps):
        return ""
    chart = line_chart([Series("images per second", "c1", rates)], "Images per second over steps")
    return section(
        "Throughput",
        _shares(run.steps),
        '<div class="grid2">',
        figure("Images per second", chart),
        _samples(run.steps),
        "</div>",
    )


def training_seconds(steps: list[Event]) -> float:
    """Time inside steps; a step that a resumed run repeated counts once."""
    return _spent(steps, "seconds")


def _spent(steps: list[Event], key: str) -> float:
    """Sum over all steps of a figure that each line states as the mean since the line before."""
    total, before = 0.0, 0.0
    for step, value in points(steps, key):
        total += value * (step - before)
        before = step
    return total


def _shares(steps: list[Event]) -> str:
    total = training_seconds(steps)
    if total <= 0:
        return ""
    parts = [(label, style, min(_spent(steps, key) / total, 1.0)) for key, label, style in _WAITS]
    parts.insert(0, ("compute", "c1", max(0.0, 1 - sum(share for _, _, share in parts))))
    items = "".join(
        f'<li><i class="{style}"></i>{label} <b>{share:.1%}</b> ({duration(share * total)})</li>'
        for label, style, share in parts
    )
    return figure(
        "Where the time goes",
        f'<ul class="legend">{items}</ul>',
        share_bar(parts, "shares of the time of a step"),
    )


def _samples(steps: list[Event]) -> str:
    totals: dict[str, int] = {}
    for event in steps:
        for source, count in (event.get("samples") or {}).items():
            totals[source] = totals.get(source, 0) + int(count)
    rows = [[name, f"{count:,}"] for name, count in sorted(totals.items())]
    rates = [value for _, value in points(steps, "images_per_second")]
    if rates:
        rows.append(["images per second, median", f"{median(rates):.1f}"])
    times = [value for _, value in points(steps, "seconds")]
    if times:
        rows.append(["seconds per step, median", f"{median(times):.2f}"])
    return figure("Samples and pace", table(["samples by source", ""], rows, "names"))
