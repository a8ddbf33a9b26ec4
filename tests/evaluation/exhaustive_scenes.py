"""Small COCO-form data sets, annotated exhaustively, for the tests of the protocols beside LVIS."""

import numpy as np
from federated_scenes import Tree, draw_annotations


def draw_exhaustive(
    seed: int, num_images: int = 8, num_categories: int = 5, grid: int = 0, flag: str = "iscrowd"
) -> Tree:
    """Images without federation; a fifth of the boxes carry `flag`."""
    tree = draw_annotations(seed, num_images, num_categories, grid=grid)
    for image in tree["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    rng = np.random.default_rng(seed)
    for annotation in tree["annotations"]:
        annotation[flag] = int(rng.random() < 0.2)
    return tree


def one_category(*boxes: dict[str, object], num_images: int = 2) -> Tree:
    """Boxes with their own keys (`image_id` and `bbox` at least) of a category 7, thing."""
    return {
        "images": [{"id": position + 1} for position in range(num_images)],
        "annotations": [{"id": i + 1, "category_id": 7, **box} for i, box in enumerate(boxes)],
        "categories": [{"id": 7, "name": "thing"}],
    }
