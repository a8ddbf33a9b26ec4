"""One raw sample, as every source gives it and every shard holds it (free of torch)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNLABELLED = -1
"""Category id of a box whose class is not known (captions, unlabelled images)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An encoded image with its boxes, in the ids of the source that it came from.

    `boxes` is (N, 4) float32, xyxy in pixels of the image as people see it (EXIF applied);
    `category_ids` is (N,) int64, `UNLABELLED` where no class is given. `coarse` says that the
    boxes are not exact: an image-level label stands on the whole image (RichSem, section 3).
    """

    key: str
    image: bytes
    extension: str
    image_id: int
    width: int
    height: int
    boxes: NDArray[np.float32]
    category_ids: NDArray[np.int64]
    negative_category_ids: tuple[int, ...] = ()
    not_exhaustive_category_ids: tuple[int, ...] = ()
    coarse: bool = False
    caption: str | None = None
