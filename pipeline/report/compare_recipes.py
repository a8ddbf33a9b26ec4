"""What makes one resolved recipe different from another, in a few words."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from pipeline.recipe import Recipe

_IDENTITY = {"name", "description", "output"}
"""Values that name a run and change nothing that it computes."""
_OPEN = 6
_LONGEST = 60
_ABSENT = object()

Difference = tuple[str, str, str]
"""Place in the recipe, value in the first, value in the other."""


def recipe_differences(first: Recipe, other: Recipe) -> list[Difference]:
    """Every value that differs, in the order of the schema; sources are paired by their name."""
    before = first.model_dump(mode="json", exclude=_IDENTITY)
    after = other.model_dump(mode="json", exclude=_IDENTITY)
    return [(place, _shown(a), _shown(b)) for place, a, b in _walk("", before, after)]


def _walk(place: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    if before == after:
        return
    before_parts, after_parts = _parts(before), _parts(after)
    if before_parts is None or after_parts is None:
        yield place, before, after
        return
    for key in dict.fromkeys([*before_parts, *after_parts]):
        inside = f"{place}.{key}" if place else key
        yield from _walk(inside, before_parts.get(key, _ABSENT), after_parts.get(key, _ABSENT))
    order = [list(before_parts), list(after_parts)]
    if isinstance(before, list) and sorted(order[0]) == sorted(order[1]) and order[0] != order[1]:
        yield f"{place} (order)", order[0], order[1]


def _parts(value: Any) -> dict[str, Any] | None:
    """A section, or a list of sources by name; None for a plain value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value):
        return {one["name"]: one for one in value}
    return None


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    if value is None:
        return "none"
    if isinstance(value, dict):
        parts = (f"{key} {_shown(one)}" for key, one in value.items() if one is not None)
        text = ", ".join(parts)
    else:
        text = json.dumps(value) if isinstance(value, bool | list) else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def differences_cell(differences: list[Difference]) -> str:
    """A list for a table cell; what goes beyond some lines is folded away."""
    items = [
        f"<li><code>{escape(place)}</code> {escape(before)} &rarr;&nbsp;<b>{escape(after)}</b></li>"
        for place, before, after in differences
    ]
    if not items:
        return "the same recipe"
    text = f'<ul class="differences">{"".join(items[:_OPEN])}</ul>'
    if len(items) > _OPEN:
        rest = "".join(items[_OPEN:])
        text += (
            f"<details><summary>{len(items) - _OPEN} more</summary>"
            f'<ul class="differences">{rest}</ul></details>'
        )
    return text
