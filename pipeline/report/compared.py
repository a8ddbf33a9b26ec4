"""Runs side by side: their labels and colours, and whether their figures may be compared."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.headline import protocol_of
from pipeline.report.run_data import Event, RunData, read_run, subset_of

_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
_STYLES = (*_COLOURS, *(f"{colour} dashed" for colour in _COLOURS))
DISTINCT = len(_STYLES)
"""More runs than that share colours and dashes, and carry a number in front of their names."""
_GIVEN = re.compile(r" \(at most [\d,]+ per image were given\)")
"""How many detections there were is a fact of the detector and not of the protocol."""
_IMAGES = re.compile(r", [\d,]+(?: of [\d,]+)? images$")


@dataclass(frozen=True, slots=True)
class Compared:
    """A run of a comparison. `obstacles` say, in words, why its figures do not compare with those
    of the first run; empty where they do."""

    label: str
    style: str
    run: RunData
    obstacles: list[str]

    def figure(self, key: str) -> object:
        """A figure of the run's last evaluation, None where there is none."""
        return None if self.run.result is None else self.run.result.get(key)


def read_runs(run_dirs: Sequence[Path]) -> list[Compared]:
    """Read runs in order; raises `DataError` for a directory that holds none."""
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    labels = _labels(run_dirs, runs)
    if len(runs) > DISTINCT:
        labels = [f"{place}. {label}" for place, label in enumerate(labels, start=1)]
    return [
        Compared(
            label=labels[place],
            style=_STYLES[place % DISTINCT],
            run=run,
            obstacles=[] if place == 0 else obstacles(runs[0], run),
        )
        for place, run in enumerate(runs)
    ]


def _labels(run_dirs: Sequence[Path], runs: Sequence[RunData]) -> list[str]:
    """Names; runs of the same name are told apart by the end of their paths, or by a number."""
    names = [run.name for run in runs]
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    longest = max(len(path.parts) for path in paths)
    labels = list(names)
    for depth in range(1, longest + 1):
        if len(set(labels)) == len(set(paths)):
            break
        labels = [
            "/".join(path.parts[-depth:]) if names.count(name) > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    seen = [labels[: place + 1].count(label) for place, label in enumerate(labels)]
    return [
        label if times == 1 else f"{label} ({times})"
        for label, times in zip(labels, seen, strict=True)
    ]


def obstacles(first: RunData, other: RunData) -> list[str]:
    """Why figures of two runs' last evaluations must not be subtracted; empty where they may."""
    if first.result is None or other.result is None:
        return ["the first run was not evaluated" if first.result is None else "not evaluated"]
    before, after = protocol_of(first.result), protocol_of(other.result)
    if before is None or after is None:
        whose = "this run" if after is None else "the first run"
        return [f"the protocol of {whose} is not recorded"]
    reasons = []
    if _rule(first.result, before) != _rule(other.result, after):
        reasons.append(f'the protocol is "{after}" and that of the first run "{before}"')
    if subset_of(first.result) != subset_of(other.result):
        here, there = subset_of(other.result), subset_of(first.result)
        reasons.append(f"evaluated on {here or 'all images'}, the first on {there or 'all images'}")
    for key, name in (("images", "images"), ("instances", "boxes"), ("categories", "categories")):
        ours, theirs = _count(other.result, key), _count(first.result, key)
        if ours != theirs:
            reasons.append(f"evaluated on {_said(ours)} {name}, the first on {_said(theirs)}")
    digests = {result.get("ground_truth") for result in (first.result, other.result)} - {None}
    if len(digests) > 1 and not reasons:
        reasons.append("evaluated on other images or annotations than the first, as many of them")
    return reasons


def _rule(result: Event, sentence: str) -> str:
    """A protocol without what it was applied to, where that is known apart from it."""
    sentence = _GIVEN.sub("", sentence)
    return sentence if _count(result, "images") is None else _IMAGES.sub("", sentence)


def _count(result: Event, key: str) -> int | None:
    counts = result.get("counts")
    value = counts.get(key) if isinstance(counts, dict) else None
    return value if isinstance(value, int) else None


def _said(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"
