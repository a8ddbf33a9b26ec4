"""Small federated data sets and detections, drawn at random, for the evaluator's tests."""

from typing import Any

import numpy as np

from pipeline.evaluation.detections import Detections, parse_detections

Tree = dict[str, Any]


def draw_annotations(
    seed: int, num_images: int = 8, num_categories: int = 7, boxes_per_image: int = 6, grid: int = 0
) -> Tree:
    """LVIS annotations with all three frequencies, negatives, not-exhaustive categories, area 0.

    With a `grid`, corners lie on its lines, so that boxes coincide and IoUs tie.
    """
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    category_ids = np.sort(rng.choice(np.arange(1, 50), num_categories, replace=False))
    for image_id in rng.permutation(np.arange(100, 100 + num_images)).tolist():
        present = rng.choice(category_ids, rng.integers(0, 4))
        others = rng.choice(category_ids, 3, replace=False).tolist()
        images.append(
            {
                "id": image_id,
                "width": 400,
                "height": 300,
                "neg_category_ids": [int(c) for c in others if c not in present],
                "not_exhaustive_category_ids": [
                    int(c) for c in category_ids if rng.random() < 0.15
                ],
            }
        )
        for category_id in present.tolist():
            for _ in range(int(rng.integers(1, boxes_per_image))):
                low = rng.uniform(0, 200, 2)
                size = rng.uniform(4, 150, 2)
                if grid:
                    low, size = low // grid * grid, (size // grid + 1) * grid
                area = float(size.prod()) * float(rng.choice([1.0, 0.6, 0.0], p=[0.6, 0.35, 0.05]))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category_id,
                        "bbox": [*low.tolist(), *size.tolist()],
                        "area": area,
                    }
                )
    rng.shuffle(annotations)  # type: ignore[arg-type]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [
            {
                "id": int(category_id),
                "name": f"thing {category_id}",
                "frequency": "rcf"[position % 3],
                "image_count": int(10 ** (position % 3)),
            }
            for position, category_id in enumerate(category_ids)
        ],
    }


def disturb(
    tree: Tree, seed: int, copies: int = 3, score_decimals: int = 2, grid: int = 0
) -> Detections:
    """The ground truth with moved boxes (by whole cells of a `grid`), some wrong categories, and
    scores that tie."""
    rng = np.random.default_rng(seed)
    category_ids = [category["id"] for category in tree["categories"]]
    rows = []
    for annotation in tree["annotations"]:
        x, y, width, height = annotation["bbox"]
        for _ in range(copies):
            noise = rng.normal(0, 0.12, 4)
            wrong = rng.random() < 0.2
            rows.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(rng.choice(category_ids))
                    if wrong
                    else annotation["category_id"],
                    "bbox": [
                        x + noise[0] * width,
                        y + noise[1] * height,
                        width * float(np.exp(noise[2])),
                        height * float(np.exp(noise[3])) * (rng.random() > 0.02),
                    ],
                    "score": round(float(rng.random()), score_decimals),
                }
            )
            if grid:
                moved = np.array([x, y, width, height]) + grid * rng.integers(-1, 2, 4)
                rows[-1]["bbox"] = np.maximum(moved, 0).tolist()
            if rng.random() < 0.1:
                rows.append(dict(rows[-1]))
    rng.shuffle(rows)  # type: ignore[arg-type]
    return parse_detections(rows)
