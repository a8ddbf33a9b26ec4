"""Which images an evaluation while training looks at: few, always the same, every rare category."""

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.ground_truth import GroundTruth


def stratified_subset(truth: GroundTruth, number: int, seed: int = 0) -> NDArray[np.int64]:
    """Ascending ids of `number` images, a pure function of its arguments.

    Every category that has ground truth is in at least one of them, rare categories first, as far
    as `number` reaches; all rare categories are in, if it takes more images than `number`. The rest
    is drawn without regard to categories. 0 means all images.
    """
    size = len(truth.image_ids)
    if not 0 < number < size:
        return truth.image_ids
    order = np.random.default_rng(seed).permutation(size)
    frequencies = np.array([frequency or "" for frequency in truth.frequencies])
    chosen: dict[int, None] = {}
    for group in ("r", "c", "f", ""):
        limit = size if group == "r" else number
        _cover(truth, frequencies == group, order, chosen, limit)
    for image in order.tolist():
        if len(chosen) >= number:
            break
        chosen[image] = None
    return truth.image_ids[np.sort(list(chosen))]


def _cover(
    truth: GroundTruth,
    columns: NDArray[np.bool_],
    order: NDArray[np.int64],
    chosen: dict[int, None],
    limit: int,
) -> None:
    """Add images until each of `columns` is in one, up to `limit` images: greedily, the image with
    most of them that are not covered yet, the first in `order` among equals."""
    pairs = np.unique(np.stack([truth.image, truth.column]), axis=1)
    wanted = columns.copy()
    wanted[pairs[1][np.isin(pairs[0], list(chosen))]] = False
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    while len(chosen) < limit:
        useful = pairs[:, wanted[pairs[1]]]
        if not useful.shape[1]:
            return
        gain = np.bincount(useful[0], minlength=len(order))
        best = np.flatnonzero(gain == gain.max())
        image = int(best[np.argmin(place[best])])
        chosen[image] = None
        wanted[pairs[1][pairs[0] == image]] = False
