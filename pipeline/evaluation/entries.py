"""Columns of json entries as arrays, checked: Python and numpy would convert text and fractions."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, StorageError

Rows = Sequence[Mapping[str, Any]]

_WHOLE = "whole numbers below 2^63"


class EntryError(DataError):
    """Entries of a list that break one rule; those of the list's pieces add up.

    `stage` orders the rules of a `key`: what breaks an earlier one is not asked for a later one.
    `names` are those of the first three of `number` entries, of `total` in the list.
    """

    def __init__(
        self,
        origin: str,
        key: str,
        stage: int,
        rule: str,
        names: list[str],
        number: int,
        total: int,
    ) -> None:
        super().__init__(origin, key, stage, rule, names, number, total)
        self.origin, self.key, self.stage, self.rule = origin, key, stage, rule
        self.names, self.number, self.total = names, number, total

    def __str__(self) -> str:
        first = ", ".join(self.names[:3])
        return f"{self.origin}: {self.rule}; {first} ({self.number} of {self.total})"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What can go wrong with a json file, as an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give the path of a json file") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a directory; give the path of a json file") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not complete json: it is no text ({error.reason} at byte {error.start}); "
            "is it compressed?"
        ) from None
    except RecursionError:
        raise DataError(f"{path} is no annotations or detections: it is nested too deep") from None
    except DataError:
        raise
    except ValueError as error:  # Broken json, or a number with thousands of digits.
        raise DataError(f"{path} is not complete json ({error}); write it again") from None


def read_json(path: str | Path) -> object:
    """Parse a local json file, or raise a `DataError` that names it."""
    path = Path(path)
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def integers(
    rows: Rows, key: str, origin: str, default: int | None = None, first: int = 0
) -> NDArray[np.int64]:
    """(N,) int64 of one key; what is no whole number of 64 bits is a `DataError`.

    With a `default` the key may be missing or null. `first` is the place of the first row in the
    list that an error tells of.
    """
    values = _column(rows, key, origin, default, first)
    if _all_of(values, _is_whole_type):
        try:
            return np.array(values, np.int64)
        except OverflowError:
            pass
    raise _error(rows, key, origin, values, is_whole, _WHOLE, first)


def integer_lists(rows: Rows, key: str, origin: str) -> tuple[NDArray[np.int64], list[int]]:
    """The numbers of one key's lists, one after another, and how long each list is."""
    values = _column(rows, key, origin, None, 0)
    if _all_of(values, _is_list_type):
        members = list(chain.from_iterable(values))
        if _all_of(members, _is_whole_type):
            try:
                return np.array(members, np.int64), [len(value) for value in values]
            except OverflowError:
                pass

    def good(value: object) -> bool:
        return isinstance(value, list | tuple) and all(map(is_whole, value))

    raise _error(rows, key, origin, values, good, f"lists of {_WHOLE}", 0)


def numbers(
    rows: Rows,
    key: str,
    origin: str,
    width: int = 0,
    default: float | None = None,
    first: int = 0,
) -> NDArray[np.float64]:
    """(N,) or (N, width) finite float64 of one key, or a `DataError`; the rest as in `integers`."""
    values = _column(rows, key, origin, default, first)
    parts: Sequence[Any] = values
    right = True
    if width:
        right = _all_of(values, _is_list_type) and set(map(len, values)) <= {width}
        parts = list(chain.from_iterable(values)) if right else []
    if right and _all_of(parts, _is_number_type):
        try:
            array = np.array(parts, np.float64)
        except OverflowError:
            array = np.array(np.nan)
        if np.isfinite(array).all():
            return array.reshape(-1, width) if width else array

    def good(value: object) -> bool:
        if not width:
            return _is_finite(value)
        if not isinstance(value, list | tuple) or len(value) != width:
            return False
        return all(map(_is_finite, value))

    what = f"lists of {width} finite numbers" if width else "finite numbers"
    raise _error(rows, key, origin, values, good, what, first)


def flags(rows: Rows, key: str, origin: str, values: tuple[int, ...] = (0, 1)) -> NDArray[np.bool_]:
    """(N,) bool of one key, False where it is absent; a value other than `values` is a `DataError`.

    Only 1 (or true) sets a flag. Text is refused: "0" would be taken for set.
    """
    given = _column(rows, key, origin, 0, 0)

    def good(value: object) -> bool:
        return isinstance(value, bool | int) and value in values

    if not all(map(good, given)):
        what = f"one of the numbers {', '.join(map(str, values))}"
        raise _error(rows, key, origin, given, good, what, 0)
    return np.array([one == 1 for one in given], bool)


def unique_ids(rows: Rows, origin: str) -> NDArray[np.int64]:
    """The rows' ids in ascending order; an id given twice is a `DataError`."""
    ids, count = np.unique(integers(rows, "id", origin), return_counts=True)
    refuse(count > 1, ids, "is an id given more than once; ids must differ", origin)
    return ids


def refuse(bad: NDArray[np.bool_] | np.bool_, values: NDArray[Any], rule: str, origin: str) -> None:
    """Raise a `DataError` with the number of bad rows and the first three different values."""
    if bad.any():
        different = dict.fromkeys(values[bad][:1000].tolist())
        first = ", ".join(str(value) for value in list(different)[:3])
        raise DataError(f"{origin}: {first} {rule} ({int(bad.sum())} of {len(values)})")


def positions(
    known: NDArray[np.int64], ids: NDArray[np.int64], what: str, origin: str
) -> NDArray[np.int64]:
    """Where each id stands in the ascending `known` ids; an unknown one is a `DataError`."""
    place = np.searchsorted(known, ids)
    found = place < len(known)
    found[found] = known[place[found]] == ids[found]
    refuse(~found, ids, f"is an unknown {what} id", origin)
    return place.astype(np.int64)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number of 64 bits; true and false are none."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        return False
    return -(2**63) <= int(value) < 2**63


def _is_finite(value: object) -> bool:
    try:
        return _is_number_type(type(value)) and math.isfinite(cast(float, value))
    except OverflowError:
        return False


def _is_whole_type(kind: type) -> bool:
    return issubclass(kind, int | np.integer) and kind is not bool


def _is_number_type(kind: type) -> bool:
    return _is_whole_type(kind) or issubclass(kind, float | np.floating)


def _is_list_type(kind: type) -> bool:
    return issubclass(kind, list | tuple)


def _all_of(values: Sequence[Any], good: Callable[[type], bool]) -> bool:
    # Of millions of values few types: this costs a small part of what parsing them does.
    return all(good(kind) for kind in set(map(type, values)))


def _column(rows: Rows, key: str, origin: str, default: float | None, first: int) -> list[Any]:
    """One key of all rows, or `EntryError` where a row is no object or lacks the key."""
    try:
        if default is None:
            return [row[key] for row in rows]
        return [default if row.get(key) is None else row[key] for row in rows]
    except (KeyError, TypeError, AttributeError, IndexError):
        wrong = [place for place, row in enumerate(rows) if not isinstance(row, Mapping)]
        rule, stage = f"entries must be json objects with {key!r}", 0
        names = [_name(rows, place, first, key, rows[place]) for place in wrong[:3]]
        if not wrong:
            wrong = [place for place, row in enumerate(rows) if key not in row]
            rule, stage = f"entries have no {key!r}, which all of them need", 1
            names = [_name(rows, place, first, key) for place in wrong[:3]]
        raise EntryError(origin, key, stage, rule, names, len(wrong), len(rows)) from None


def _error(
    rows: Rows,
    key: str,
    origin: str,
    values: Sequence[Any],
    good: Callable[[object], bool],
    what: str,
    first: int,
) -> EntryError:
    wrong = [place for place, value in enumerate(values) if not good(value)]
    assert wrong, f"{key}: a whole list was refused that has no wrong entry"
    names = [_name(rows, place, first, key, values[place]) for place in wrong[:3]]
    rule = f"{key} must be {what}"
    return EntryError(origin, key, 2, rule, names, len(wrong), len(rows))


_NO_VALUE = object()


def _name(rows: Rows, place: int, first: int, key: str, value: object = _NO_VALUE) -> str:
    """An entry by its place, by the id of itself or its image, and by what its `key` has."""
    row, known = rows[place], []
    if isinstance(row, Mapping):
        names = (("id", "id"), ("image_id", "image"))
        known = [
            f"{name} {shortened(row[id_])}" for id_, name in names if id_ in row and id_ != key
        ]
    if value is not _NO_VALUE:
        known = [*known[:1], shortened(value)]
    return f"entry {first + place}" + (f" ({', '.join(known)})" if known else "")
