"""One place in a batch, and what may be done with a row of them; free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.data.plan.draws import draw

StreamName = Literal["train", "extra"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a batch.

    `position` counts within the stream and `seed` is drawn from it. `weight` is 0 for padding,
    which repeats a real sample. `partners` are further samples of the source: for a mosaic in the
    extra stream, to paste from in the train stream. `shape_seed` is that of all slots of the step,
    where they are of like shapes.
    """

    stream: StreamName
    source: str
    index: int
    position: int
    seed: int
    weight: int = 1
    partners: tuple[int, ...] = ()
    shape_seed: int | None = None


def substitute(seed: int, index: int, attempt: int, among: range) -> int:
    """The sample that takes the place of an unreadable one: an index of `among`, not `index`.

    Depends on the slot's seed and not on who reads it, so every world size picks the same.
    """
    assert index in among and len(among) > 1
    step = 1 + draw(seed, "substitute", index, attempt) % (len(among) - 1)
    return among[(index - among.start + step) % len(among)]


def micro_batches(slots: Sequence[Slot], micro_batch: int) -> list[list[Slot]]:
    """Cut a rank's slots into batches of one size, at most `micro_batch`, padded with weight 0."""
    count = -(-len(slots) // micro_batch)
    size = -(-len(slots) // count)
    padded = [*slots, *(replace(slots[-1], weight=0) for _ in range(count * size - len(slots)))]
    return [padded[i * size : (i + 1) * size] for i in range(count)]
