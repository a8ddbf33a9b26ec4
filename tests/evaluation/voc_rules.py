"""The rules of Pascal VOC's development kit as plain loops over a class, on VOC's coordinates."""

import math
from typing import Literal

Corners = tuple[float, float, float, float]
"""xmin, ymin, xmax, ymax of the first and last pixel; the first of a photograph is 1."""
Year = Literal[2007, 2010]


def overlap(a: Corners, b: Corners) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return -math.inf
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def slow_ap(
    objects: dict[int, list[tuple[Corners, bool]]],
    detections: list[tuple[int, float, Corners]],
    year: Year,
) -> float | None:
    """AP of one class. `objects`: image -> (box, difficult); `detections`: image, score, box."""
    positives = sum(not difficult for boxes in objects.values() for _, difficult in boxes)
    if not positives:
        return None
    used: set[tuple[int, int]] = set()
    true = false = 0
    curve = [(0.0, 0.0)]
    for image, _, box in sorted(detections, key=lambda one: -one[1]):
        best, chosen = -math.inf, -1
        for position, (other, _) in enumerate(objects.get(image, [])):
            if overlap(box, other) > best:
                best, chosen = overlap(box, other), position
        if best >= 0.5 and objects[image][chosen][1]:
            continue
        if best >= 0.5 and (image, chosen) not in used:
            used.add((image, chosen))
            true += 1
        else:
            false += 1
        curve.append((true / positives, true / (true + false)))
    if year == 2007:
        # MATLAB's 0:0.1:1 has 0.1 * 3 in fourth place.
        levels = [0.0, 0.1, 0.2, 0.1 * 3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
        return sum(max([p for r, p in curve if r >= level] or [0.0]) for level in levels) / 11
    area = 0.0
    for start in range(len(curve) - 1):
        width = curve[start + 1][0] - curve[start][0]
        area += width * max(p for _, p in curve[start + 1 :])
    return area


def corners(bbox: list[float], extra: int = 0) -> Corners:
    x, y, width, height = bbox
    return (x + 1, y + 1, x + width + extra, y + height + extra)
