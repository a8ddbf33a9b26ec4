"""What a run had seen of the data when it was evaluated."""

from collections.abc import Mapping
from html import escape
from typing import Any

from pipeline.report.elements import DASH, count, fraction, note, number, section, table
from pipeline.report.headline import column_heads
from pipeline.report.run_data import Event, RunData, subset_of

_GROUPS = {"r": "rare", "c": "common", "f": "frequent"}


def consumed_section(run: RunData) -> str:
    """Samples of each source and boxes of each frequency group, by evaluation; newest first."""
    events = [event for event in reversed(run.curve) if consumed_part(event, "samples")]
    if not events:
        return ""
    sources = sorted({source for event in events for source in consumed_part(event, "samples")})
    heads = ["step", "AP", "APr"]
    cells = column_heads(heads) + [escape(source) for source in sources] + ["all samples"]
    cells += [f'<span class="{name}">{name} boxes</span>' for name in _GROUPS.values()]
    rows = []
    for event in events:
        samples, instances = consumed_part(event, "samples"), consumed_part(event, "instances")
        subset = subset_of(event)
        mark = f' <span class="subset">{escape(subset)}</span>' if subset else ""
        rows.append(
            [
                f"{event['step']:,}{mark}",
                *(fraction(event.get(key)) for key in heads[1:]),
                *(count(samples.get(source)) for source in sources),
                count(sum(number(value) or 0 for value in samples.values())),
                *(count(instances.get(key)) if instances else DASH for key in _GROUPS),
            ]
        )
    text = "Samples and labelled boxes that training had used up to each evaluation."
    return section("Consumed", note(text), table(cells, rows, "steps"))


def consumed_part(event: Event, name: str) -> Mapping[str, Any]:
    """`samples` by source or `instances` by frequency group; empty where a line has none."""
    consumed = event.get("consumed")
    part = consumed.get(name) if isinstance(consumed, Mapping) else None
    return part if isinstance(part, Mapping) else {}
