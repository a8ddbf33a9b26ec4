"""The json beside each image of a shard: everything of a sample but the image."""

import json
from collections.abc import Mapping

import numpy as np

from pipeline.data.sample import Sample


def sample_to_json(sample: Sample) -> bytes:
    """Everything of a sample but its image."""
    tree = {
        "key": sample.key,
        "extension": sample.extension,
        "image_id": sample.image_id,
        "width": sample.width,
        "height": sample.height,
        # The shortest decimals that give the same float32 again.
        "boxes": [[float(str(side)) for side in box] for box in sample.boxes.astype(np.float32)],
        "category_ids": sample.category_ids.tolist(),
        "negative_category_ids": list(sample.negative_category_ids),
        "not_exhaustive_category_ids": list(sample.not_exhaustive_category_ids),
        "coarse": sample.coarse,
        "caption": sample.caption,
    }
    return json.dumps(tree, separators=(",", ":")).encode()


def sample_from_json(image: bytes, tree: Mapping) -> Sample:
    """A sample from its encoded image and its parsed json."""
    return Sample(
        key=tree["key"],
        image=image,
        extension=tree["extension"],
        image_id=tree["image_id"],
        width=tree["width"],
        height=tree["height"],
        boxes=np.array(tree["boxes"], dtype=np.float32).reshape(-1, 4),
        category_ids=np.array(tree["category_ids"], dtype=np.int64),
        negative_category_ids=tuple(tree["negative_category_ids"]),
        not_exhaustive_category_ids=tuple(tree["not_exhaustive_category_ids"]),
        coarse=tree["coarse"],
        caption=tree["caption"],
    )
