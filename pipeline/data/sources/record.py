"""What a source lists before any image is read, and the reading of one image."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.data.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its annotation, small and picklable.

    `path` is a path or fsspec URL; `boxes` is (N, 4) float32 xyxy in pixels, or None for one box
    over the whole image, whose size is not known before it is read; `category_ids` is (N,) int64.
    `declared_size` is (width, height) as the annotation states it, `num_bytes` as storage lists it.
    """

    key: str
    path: str
    image_id: int
    boxes: NDArray[np.float32] | None
    category_ids: NDArray[np.int64]
    negative_category_ids: tuple[int, ...] = ()
    not_exhaustive_category_ids: tuple[int, ...] = ()
    coarse: bool = False
    caption: str | None = None
    declared_size: tuple[int, int] | None = None
    num_bytes: int | None = None


@dataclass
class RecordSet:
    """All records of a source, and what was left out or altered: reason to count and to examples.

    At most `MAX_EXAMPLES` examples are kept for each reason.
    """

    vocabulary: Vocabulary
    records: Sequence[Record]
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        """Count what is left out or altered."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(example)


MAX_EXAMPLES = 5
