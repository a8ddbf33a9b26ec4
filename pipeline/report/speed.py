"""Throughput, and where the time of a step goes."""

from html import escape
from statistics import median

from pipeline.report.charts import Series, line_chart, share_bar
from pipeline.report.elements import duration, figure, legend, number, section, table
from pipeline.report.run_data import Event, RunData, points

_WAITS = (("data_wait", "waiting for data", "c2"), ("teacher_wait", "waiting for teacher", "c3"))
_MEMORY = (
    ("memory_gb", "resident memory of a worker process", "c1"),
    ("gpu_memory_gb", "GPU memory", "c2"),
)


def speed_section(run: RunData) -> str:
    """Images a second, shares of data, teacher and compute, samples by source, memory."""
    rates = points(run.steps, "images_per_second")
    if not rates and not any("seconds" in event for event in run.steps):
        return ""
    chart = line_chart([Series("images per second", "c1", rates)], "Images per second over steps")
    return section(
        "Throughput",
        _shares(run.steps),
        '<div class="grid2">',
        figure("Images per second", chart),
        _memory(run.steps),
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


def _memory(steps: list[Event]) -> str:
    series = [
        Series(name, style, points(steps, key))
        for key, name, style in _MEMORY
        if points(steps, key)
    ]
    chart = line_chart(series, "Memory over steps", axis_titles=("step", "GB"))
    shown = legend([(one.name, one.style) for one in series])
    return figure("Memory", shown, chart)


def samples_by_source(steps: list[Event]) -> dict[str, int]:
    """Samples that all logged steps together took of each source."""
    totals: dict[str, int] = {}
    for event in steps:
        samples = event.get("samples")
        for source, value in samples.items() if isinstance(samples, dict) else ():
            totals[source] = totals.get(source, 0) + int(number(value) or 0)
    return totals


def _samples(steps: list[Event]) -> str:
    totals = samples_by_source(steps)
    rows = [[escape(name), f"{count:,}"] for name, count in sorted(totals.items())]
    rates = [value for _, value in points(steps, "images_per_second")]
    if rates:
        rows.append(["images per second, median", f"{median(rates):.1f}"])
    times = [value for _, value in points(steps, "seconds")]
    if times:
        rows.append(["seconds per step, median", f"{median(times):.2f}"])
    return figure("Samples and pace", table(["samples by source", ""], rows, "names"))
