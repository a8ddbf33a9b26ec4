"""Loss terms and optimisation curves over steps."""

import re
from collections.abc import Sequence

from pipeline.report.charts import Series, line_chart
from pipeline.report.elements import figure, legend, section
from pipeline.report.run_data import Event, RunData, points

_TERM = re.compile(r"loss/(?P<base>.+?)(?P<denoising>_dn)?(?:_(?P<part>\d+|encoder))?", re.DOTALL)

_TITLES = {
    "class": "Class",
    "box_l1": "Box L1",
    "box_giou": "Box GIoU",
    "semantic": "Semantic (KL to the teacher)",
    "image_level": "Image-level labels (Detic)",
}


def losses_section(run: RunData) -> str:
    """The whole loss, one small chart for each term, learning rate and gradient norm."""
    if not run.steps:
        return ""
    charts = [_total(run.steps)]
    bases: dict[str, list[str]] = {}
    for key in sorted({key for event in run.steps for key in event}):
        match = _TERM.fullmatch(key)
        if match is not None:
            bases.setdefault(match["base"], []).append(key)
    order = sorted(bases, key=lambda base: list(_TITLES).index(base) if base in _TITLES else 9)
    charts += [_term(run.steps, base, bases[base]) for base in order]
    charts += [
        _plain(run.steps, "learning_rate", "Learning rate"),
        _plain(run.steps, "grad_norm", "Gradient norm", averaged=True),
    ]
    note = (
        "Terms are as weighted by the recipe; points of long loss curves are means of neighbouring "
        "steps, which the words beside the pointer name."
    )
    if _streams_apart(run.steps):
        note += " Steps of the extra (image-level) stream are drawn dashed, apart from the rest."
    return section("Training", f'<p class="note">{note}</p><div class="grid2">', *charts, "</div>")


def _streams_apart(steps: Sequence[Event]) -> bool:
    """Whether lines are of single steps, of both streams; longer windows mix the streams."""
    streams = {str(event.get("stream")) for event in steps}
    return {"train", "extra"} <= streams and steps[-1]["step"] - steps[0]["step"] < len(steps)


def _of_stream(steps: Sequence[Event], extra: bool) -> list[Event]:
    if not _streams_apart(steps):
        return [] if extra else list(steps)
    return [event for event in steps if (event.get("stream") == "extra") == extra]


def _both_streams(steps: Sequence[Event], key: str, name: str, style: str) -> list[Series]:
    """One series of a key, and a dashed one of the extra stream where that learns the term."""
    extra = points(_of_stream(steps, extra=True), key)
    series = [Series(name, style, points(_of_stream(steps, extra=False), key))]
    if any(value for _, value in extra):
        series.append(Series(f"{name}, extra stream", f"{style} dashed", extra))
    return series


def _total(steps: Sequence[Event]) -> str:
    return _figure("Total loss", _both_streams(steps, "loss", "total", "c1"))


def _term(steps: Sequence[Event], base: str, keys: Sequence[str]) -> str:
    named: dict[str, list[Series]] = {"layers": [], "encoder": [], "denoising": [], "last": []}
    for key in keys:
        match = _TERM.fullmatch(key)
        assert match is not None
        if match["part"] == "encoder":
            named["encoder"] += _both_streams(steps, key, "encoder", "c3")
        elif match["part"] is not None:
            kind = "denoising, " if match["denoising"] else ""
            named["layers"] += [
                Series(
                    f"{kind}layer {match['part']}",
                    "faint",
                    points(_of_stream(steps, extra=False), key),
                )
            ]
        elif match["denoising"]:
            named["denoising"] += _both_streams(steps, key, "denoising queries", "c2")
        else:
            named["last"] += _both_streams(steps, key, "matched queries", "c1")
    series = [
        one for group in named.values() for one in group if any(value for _, value in one.points)
    ]
    return _figure(_TITLES.get(base, base), series)


def _plain(steps: Sequence[Event], key: str, title: str, averaged: bool = False) -> str:
    series = [Series(title.lower(), "c1", points(list(steps), key))]
    return _figure(title, series, log=False, averaged=averaged)


def _figure(title: str, series: Sequence[Series], log: bool = True, averaged: bool = True) -> str:
    chart = line_chart(series, f"{title} over steps", log=log, averaged=averaged)
    # The note above explains dashes, and all earlier layers share one entry.
    entries = [
        (one.name, one.style)
        for one in reversed(series)
        if one.points and one.style in ("c1", "c2", "c3")
    ]
    if any(one.style == "faint" and one.points for one in series):
        entries.append(("earlier decoder layers", "faint"))
    return figure(title, legend(entries) if len(entries) > 1 else "", chart)
