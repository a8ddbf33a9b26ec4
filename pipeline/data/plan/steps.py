"""The global sample order, a pure function of (data, seed, step); free of torch.

Every random number is a hash, or a raw word of a Philox generator, keyed by what it decides and
never by a process: any rank computes its slice of any step at once, whatever ran before.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from pipeline.data.plan.draws import draw
from pipeline.data.plan.like_shapes import LikeShapes
from pipeline.data.plan.order import WINDOW_SHARDS, SourceOrder, StreamOrder
from pipeline.data.plan.sampling import Sampling, StreamSource
from pipeline.data.plan.slot import Slot, StreamName
from pipeline.errors import DataError, RecipeError

PLAN_VERSION = 1
MOSAIC_PARTNERS = 3


StepKind = Literal["train", "extra", "mixed"]


def build_plan(
    train: Sequence[StreamSource],
    extra: Sequence[StreamSource] = (),
    *,
    batch_size: int,
    seed: int,
    extra_mode: Literal["alternate", "mixed"] = "alternate",
    extra_ratio: float = 1.0,
    sampling: Sampling = "repeat_factor",
    repeat_threshold: float = 0.0,
    window_shards: int = WINDOW_SHARDS,
    mosaic: bool = False,
    copy_paste_probability: float = 0.0,
    like_shapes: LikeShapes | None = None,
) -> "Plan":
    """Plan the train stream (by `sampling`) and the extra one (each sample once an epoch).

    Raises `DataError` for a source without samples, for weights that are not positive, and for
    class-aware sampling of a source without categories.
    """
    weights = _weights([*train, *extra])

    def stream(
        name: StreamName, sources: Sequence[StreamSource], partners: int, chance: float
    ) -> StreamOrder:
        orders = [
            SourceOrder(
                source,
                seed,
                sampling=sampling if name == "train" else "uniform",
                repeat_threshold=repeat_threshold,
                window_shards=window_shards,
            )
            for source in sources
        ]
        shares = [weights[source.name] for source in sources]
        return StreamOrder(name, orders, shares, seed, partners=partners, partner_chance=chance)

    pasted = copy_paste_probability
    streams: dict[StreamName, StreamOrder] = {
        "train": stream("train", train, 1 if pasted else 0, pasted)
    }
    if extra:
        streams["extra"] = stream("extra", extra, MOSAIC_PARTNERS if mosaic else 0, 1.0)
    return Plan(
        streams=streams,
        batch_size=batch_size,
        seed=seed,
        mixed=bool(extra) and extra_mode == "mixed",
        ratio=_exact(extra_ratio) if extra else Fraction(),
        window_shards=window_shards,
        sampling=sampling,
        repeat_threshold=_exact(repeat_threshold),
        like_shapes=like_shapes,
    )


@dataclass(frozen=True)
class Plan:
    """Which samples each step has; made by `build_plan`."""

    streams: dict[StreamName, StreamOrder]
    batch_size: int
    seed: int
    mixed: bool
    ratio: Fraction
    window_shards: int
    sampling: Sampling
    repeat_threshold: Fraction
    like_shapes: LikeShapes | None
    extra_slots: int = field(init=False)
    """Slots of a mixed batch that are extra."""

    def __post_init__(self) -> None:
        share = round(self.batch_size * self.ratio / (1 + self.ratio))
        slots = min(max(share, 1), self.batch_size - 1) if self.mixed else 0
        object.__setattr__(self, "extra_slots", slots)

    def kind(self, step: int) -> StepKind:
        """Whether a step takes train data, extra data or both."""
        return "mixed" if self.mixed else self._alternate(step)[0]

    def batch(self, step: int) -> list[Slot]:
        """All slots of the global batch."""
        slots = self._slots(step, range(self.batch_size))
        if self.like_shapes is None:
            return slots
        return self.like_shapes.arrange(slots, draw(self.seed, "shape", step) >> 1)

    def step(self, step: int, rank: int, world_size: int) -> list[Slot]:
        """The ceil(batch_size / world_size) slots of one rank: a contiguous part of the batch,
        and padding of weight 0 where the batch does not divide. For `like_shapes` every so many
        slots of the batch instead, and as many more of weight 0 as make whole micro-batches."""
        assert 0 <= rank < world_size
        if self.like_shapes is not None:
            return self.like_shapes.deal(self.batch(step), rank, world_size)
        start = rank * self.batch_size // world_size
        stop = (rank + 1) * self.batch_size // world_size
        slots = self._slots(step, range(start, stop))
        padding = -(-self.batch_size // world_size) - len(slots)
        if padding:
            real = slots[0] if slots else self._slots(step, range(start, start + 1))[0]
            slots.extend([replace(real, weight=0)] * padding)
        return slots

    def sources(self, step: int) -> dict[str, int]:
        """How many slots of the global batch each source has."""
        counts: dict[str, int] = {}
        for name, start, number in self._shares(step):
            counts |= self.streams[name].counts(start, start + number)
        return counts

    def steps_before(self, step: int) -> dict[StepKind, int]:
        """How many steps of each kind come before a step; kinds that have none are left out."""
        if self.mixed:
            return {"mixed": step} if step else {}
        name, number = self._alternate(step)
        counts: dict[StepKind, int] = {"train": number, "extra": step - number}
        if name == "extra":
            counts = {"train": step - number, "extra": number}
        return {kind: count for kind, count in counts.items() if count}

    def samples_before(self, step: int) -> dict[str, int]:
        """How many slots of each source the steps before a step have together."""
        if self.mixed:
            ends = {name: start for name, start, _ in self._shares(step)}
        else:
            steps = self.steps_before(step)
            ends = {name: steps.get(name, 0) * self.batch_size for name in self.streams}
        counts: dict[str, int] = {}
        for name, stream in self.streams.items():
            counts |= stream.counts(0, ends[name])
        return counts

    def shards_ahead(self, step: int) -> dict[str, list[int]]:
        """By source of the step's streams, the shards read from it on: of two windows, in order."""
        ahead: dict[str, list[int]] = {}
        for name, start, _ in self._shares(step):
            ahead |= self.streams[name].shards_ahead(start)
        return ahead

    @property
    def epoch_lengths(self) -> dict[str, int]:
        """Positions in one pass over each source, repeats included."""
        orders = [order for stream in self.streams.values() for order in stream.orders]
        return {order.name: order.epoch_length for order in orders}

    @property
    def left_out(self) -> dict[str, int]:
        """Samples of each source that no epoch has, where there are any."""
        orders = [order for stream in self.streams.values() for order in stream.orders]
        return {order.name: order.num_left_out for order in orders if order.num_left_out}

    def state(self) -> dict[str, int | str]:
        """What the order depends on: goes into a checkpoint's manifest beside the step."""
        state: dict[str, int | str] = {
            "version": PLAN_VERSION,
            "window_shards": self.window_shards,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "extra_slots": self.extra_slots,
            "extra_ratio": str(self.ratio),
            "sampling": self.sampling,
            "repeat_threshold": str(self.repeat_threshold),
            "like_shapes": int(self.like_shapes is not None),
        }
        for name, stream in self.streams.items():
            state[f"{name}.partners"] = stream.partners
            state[f"{name}.partner_chance"] = str(_exact(stream.partner_chance))
            for order, share in zip(stream.orders, stream.shares, strict=True):
                state[f"{name}.{order.name}.digest"] = order.digest
                state[f"{name}.{order.name}.epoch_length"] = order.epoch_length
                state[f"{name}.{order.name}.share"] = str(share)
        return state

    def check(self, state: dict[str, int | str]) -> None:
        """Refuse (`RecipeError`) the state of a plan that gives another order."""
        own = self.state()
        changed = [
            f"{key} was {state.get(key, 'absent')} and is {own.get(key, 'absent')}"
            for key in sorted(own.keys() | state.keys())
            if own.get(key) != state.get(key)
        ]
        if changed:
            raise RecipeError(
                f"the data or the recipe differ from those of the checkpoint, so the run cannot go "
                f"on in the same order: {'; '.join(changed)}. Restore what changed, or give the "
                "recipe another name to start a new run"
            )

    def _shares(self, step: int) -> list[tuple[StreamName, int, int]]:
        """(stream, first position, number of positions) of a step."""
        if self.mixed:
            own, other = self.batch_size - self.extra_slots, self.extra_slots
            return [("train", step * own, own), ("extra", step * other, other)]
        name, number = self._alternate(step)
        return [(name, number * self.batch_size, self.batch_size)]

    def _alternate(self, step: int) -> tuple[StreamName, int]:
        """The stream of a step and how many steps of that stream came before it.

        n train steps have floor(n * ratio) extra ones right after them, so the ratio holds
        cumulatively.
        """
        rounds = int(Fraction(step + 1) / (1 + self.ratio)) + 1
        while rounds + int(rounds * self.ratio) > step:
            rounds -= 1
        extra = int(rounds * self.ratio)
        past = step - rounds - extra
        return ("extra", extra + past - 1) if past else ("train", rounds)

    def _slots(self, step: int, places: range) -> list[Slot]:
        shares = self._shares(step)
        if len(shares) == 1:
            name, start, _ = shares[0]
            return [self.streams[name].slot(start + place) for place in places]
        (_, start, _), (_, extra_start, number) = shares
        slots = []
        for place in places:
            before = place * number // self.batch_size
            if (place + 1) * number // self.batch_size > before:
                slots.append(self.streams["extra"].slot(extra_start + before))
            else:
                slots.append(self.streams["train"].slot(start + place - before))
        return slots


def _weights(sources: Sequence[StreamSource]) -> dict[str, Fraction]:
    """The weight of each source by its name."""
    for name, number in Counter(source.name for source in sources).items():
        if number > 1:
            raise DataError(
                f"{number} sources of the mixture are called {name}; give each a name of its own"
            )
    for source in sources:
        if not (source.weight > 0 and math.isfinite(source.weight)):
            raise DataError(
                f"source {source.name} has weight {source.weight}, and a weight is a number above "
                "0; to leave a source out take it out of the recipe"
            )
    return {source.name: _exact(source.weight) for source in sources}


def _exact(number: float) -> Fraction:
    """The decimal that a recipe gives, so that 0.1 is a tenth."""
    return Fraction(repr(number))
