"""What a run could not train on, and how much of that its budget allows."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.data.stream.reader import Reading
from pipeline.errors import DataError

logger = logging.getLogger(__name__)


@dataclass
class Ledger:
    """What was left out of training: boxes by (source, reason), unreadable images by sample id.

    `unreadable` holds the images of all ranks and of the run before it was resumed, as far as they
    were entered (`merge`). More than `budget` of one source raise `DataError`.
    """

    budget: int
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    unshared: dict[str, str] = field(default_factory=dict)
    """Those of `unreadable` that were met here and not yet given to `merge`."""

    def add(self, reading: Reading) -> None:
        """Enter what a reading left out; the first of each kind is logged."""
        for place, count in reading.dropped.items():
            if place not in self.dropped:
                logger.info("source %s: %s are left out of training", *place)
            self.dropped[place] += count
        for source, sample_id, reason in reading.unreadable:
            if sample_id in self.unreadable:
                continue
            self.unreadable[sample_id] = self.unshared[sample_id] = reason
            logger.warning("%s: %s; another sample takes its place", sample_id, reason)
            self._check(source)

    def merge(self, unreadable: Mapping[str, str]) -> None:
        """Enter unreadable images that all ranks, or an earlier part of the run, have met."""
        for sample_id in unreadable:
            self.unshared.pop(sample_id, None)
        self.unreadable = dict(sorted({**unreadable, **self.unreadable}.items()))
        for source in sorted({sample_id.split("/", 1)[0] for sample_id in self.unreadable}):
            self._check(source)

    def _check(self, source: str) -> None:
        bad = [known for known in self.unreadable if known.startswith(f"{source}/")]
        if len(bad) > self.budget:
            shown = "; ".join(f"{known}: {self.unreadable[known]}" for known in bad[-5:])
            raise DataError(
                f"source {source}: {len(bad)} images cannot be read, more than "
                f"data.bad_sample_budget {self.budget} allows (the last of them are {shown}); "
                "repair or remove them and prepare again, or raise the budget"
            )
