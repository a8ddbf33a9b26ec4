"""Throughput, and where the time of a step goes."""

from collections import Counter
from collections.abc import Mapping
from html import escape
from statistics import median
from typing import Any

from pipeline.report.charts import Series, line_chart, share_bar
from pipeline.report.consumed import consumed_part
from pipeline.report.elements import duration, figure, legend, number, section, table, whole
from pipeline.report.run_data import Event, RunData, points

_WAITS = (
    ("data_wait", "waiting for data", "c2"),
    ("teacher_wait", "waiting for teacher", "c3"),
    ("checkpoint_wait", "saving checkpoints", "c4"),
    ("evaluation_wait", "waiting for evaluation", "c5"),
)
_MEMORY = (
    ("memory_gb", "first worker, peak resident memory so far", "c1"),
    ("gpu_memory_gb", "first worker, peak allocated GPU memory so far", "c2"),
)


def speed_section(run: RunData) -> str:
    """Images a second, shares of waiting and of the work itself, memory; samples by source, padding
    and boxes left out."""
    rates = points(run.steps, "images_per_second")
    if not rates and not any("seconds" in event for event in run.steps):
        return ""
    pace = [Series("images per second", "c1", rates)]
    chart = line_chart(pace, "Images per second over steps", averaged=True)
    return section(
        "Throughput",
        _shares(run.steps),
        '<div class="grid2">',
        figure("Images per second", chart),
        _memory(run.steps),
        _samples(run),
        "</div>",
    )


def training_seconds(steps: list[Event]) -> float:
    """Time inside steps; a step that a resumed run repeated counts once."""
    return _spent(steps, "seconds")


def _spent(steps: list[Event], key: str) -> float:
    """Sum over all steps of a figure that each line states as the mean over its `steps` steps.

    Where a line does not say how many, they are those since the line before.
    """
    total, before = 0.0, 0.0
    for event in steps:
        value = number(event.get(key))
        if value is None:
            continue
        stated = whole(event.get("steps"))
        total += value * (event["step"] - before if stated is None else stated)
        before = event["step"]
    return total


def _shares(steps: list[Event]) -> str:
    seconds = training_seconds(steps)
    if seconds <= 0:
        return ""
    waits = [
        (label, style, max(0.0, _spent(steps, key)))
        for key, label, style in _WAITS
        if points(steps, key)
    ]
    waited = sum(spent for _, _, spent in waits)
    # Waits are means over workers and seconds the first worker's: together they may be more.
    total = max(seconds, waited)
    work = "forward, backward, update"
    if not points(steps, "checkpoint_wait"):
        work += ", saving"
    parts = [(work, "c1", total - waited), *waits]
    items = "".join(
        f'<li><i class="{style}"></i>{label} <b>{spent / total:.1%}</b> ({duration(spent)})</li>'
        for label, style, spent in parts
    )
    return figure(
        "Where the time goes",
        f'<ul class="legend">{items}</ul>',
        share_bar(
            [(label, style, spent / total) for label, style, spent in parts],
            "shares of the time of a step",
        ),
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


def samples_by_source(run: RunData) -> tuple[int, dict[str, int]]:
    """A step, and the samples that training had taken of each source up to it.

    The newest count of the run itself; where it logged none, the sum of all lines.
    """
    counted = max(
        (event for event in [*run.curve, *run.steps] if consumed_part(event, "samples")),
        key=lambda event: int(event["step"]),
        default=None,
    )
    if counted is not None:
        return counted["step"], _counts(consumed_part(counted, "samples"))
    totals: Counter[str] = Counter()
    for event in run.steps:
        samples = event.get("samples")
        totals.update(_counts(samples if isinstance(samples, dict) else {}))
    return run.steps[-1]["step"] if run.steps else 0, totals


def _counts(samples: Mapping[str, Any]) -> dict[str, int]:
    return {source: int(number(value) or 0) for source, value in samples.items()}


def _dropped(steps: list[Event]) -> Counter[str]:
    """Boxes that the steps were left without, by reason."""
    totals: Counter[str] = Counter()
    for event in steps:
        dropped = event.get("dropped")
        if isinstance(dropped, Mapping):
            totals.update({reason: whole(value) or 0 for reason, value in dropped.items()})
    return totals


def _samples(run: RunData) -> str:
    step, totals = samples_by_source(run)
    rows = [[escape(name), f"{count:,}"] for name, count in sorted(totals.items())]
    rates = [value for _, value in points(run.steps, "images_per_second")]
    if rates:
        rows.append(["images per second, median", f"{median(rates):.1f}"])
    times = [value for _, value in points(run.steps, "seconds")]
    if times:
        rows.append(["seconds per step, median", f"{median(times):.2f}"])
    if padding := [value for _, value in points(run.steps, "padding")]:
        rows.append(["padding in batches, median", f"{median(padding):.1%}"])
    for reason, number_dropped in sorted(_dropped(run.steps).items()):
        rows.append([f"left out: {escape(reason)}", f"{number_dropped:,}"])
    head = [f"samples by source, up to step {step:,}", ""]
    return figure("Samples and pace", table(head, rows, "names"))
