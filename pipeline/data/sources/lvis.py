"""LVIS (Gupta et al. 2019): COCO photographs, federated annotation.

v1 has 1203 categories, v0.5 has 1230; minival is a part of v1's val. All have one form.
"""

import numpy as np

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.instances import (
    Instances,
    box_array,
    box_of,
    check_category_list,
    clip_box,
    coco_names,
    find_images,
    read_instances,
)
from pipeline.data.sources.record import Record, RecordSet
from pipeline.errors import DataError
from pipeline.recipe import Source


def list_lvis(source: Source, root: str) -> RecordSet:
    """One record for each image of an LVIS json, in ascending image id.

    An image is looked for by the path of its `coco_url` (`val2017/000000000139.jpg`), then by its
    `file_name`, which v0.5 writes as in 2014 (see `coco_names`). Missing `neg_category_ids` or
    `not_exhaustive_category_ids` are a `DataError`.
    """
    instances = read_instances(source, root)
    record_set = RecordSet(instances.vocabulary, [])
    record_set.records = [
        _record(source, instances, record_set, *found)
        for found in find_images(source, root, instances, coco_names)
    ]
    return record_set


def _record(
    source: Source,
    instances: Instances,
    record_set: RecordSet,
    image: dict,
    path: str,
    num_bytes: int | None,
) -> Record:
    boxes, category_ids = [], []
    for annotation in instances.by_image[image["id"]]:
        if annotation.get("iscrowd"):
            raise DataError(
                f"{instances.url}: annotation {annotation['id']}: iscrowd is set, and LVIS has no "
                "crowd regions; is it a COCO file?"
            )
        box = clip_box(box_of(annotation, instances.url), image, annotation, record_set)
        if box[2] <= box[0] or box[3] <= box[1]:
            raise DataError(
                f"{instances.url}: annotation {annotation['id']}: bbox {annotation['bbox']} is "
                f"empty inside its image of {image['width']}x{image['height']} pixels; remove or "
                "correct it"
            )
        boxes.append(box)
        category_ids.append(annotation["category_id"] if source.use_labels else UNLABELLED)
    return Record(
        key=f"{image['id']:012d}",
        path=path,
        image_id=image["id"],
        boxes=box_array(boxes),
        category_ids=np.array(category_ids, dtype=np.int64),
        negative_category_ids=check_category_list(image, "neg_category_ids", instances),
        not_exhaustive_category_ids=check_category_list(
            image, "not_exhaustive_category_ids", instances
        ),
        declared_size=(image["width"], image["height"]),
        num_bytes=num_bytes,
    )
