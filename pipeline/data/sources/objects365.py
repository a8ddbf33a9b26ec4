"""Objects365 (Shao et al. 2019): 365 categories, boxes on every instance, images in patches."""

import numpy as np

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.instances import (
    Instances,
    box_array,
    box_of,
    clip_box,
    find_images,
    read_instances,
)
from pipeline.data.sources.record import Record, RecordSet
from pipeline.recipe import Source

_FLAGS = {
    "iscrowd": "box around a crowd, left out",
    "ignore": "box marked `ignore`, left out",
}


def list_objects365(source: Source, root: str) -> RecordSet:
    """One record for each image of an Objects365 json, in ascending image id.

    `file_name` is looked for under `images` with and without its leading folders
    (`images/v1/patch8/x.jpg`, `patch8/x.jpg`, `x.jpg`). The published files hold boxes that are
    crowds, empty, outside or given twice: those are left out and counted. Boxes flagged `isfake`
    (a picture or toy of the thing) and `isreflected` stay, since they look like their category.
    """
    instances = read_instances(source, root)
    record_set = RecordSet(instances.vocabulary, [])
    records = []
    for image, path, num_bytes in find_images(source, root, instances, _image_names):
        boxes, category_ids = _boxes(image, instances, record_set)
        if not source.use_labels:
            category_ids = [UNLABELLED] * len(category_ids)
        records.append(
            Record(
                key=f"{image['id']:012d}",
                path=path,
                image_id=image["id"],
                boxes=box_array(boxes),
                category_ids=np.array(category_ids, dtype=np.int64),
                declared_size=(image["width"], image["height"]),
                num_bytes=num_bytes,
            )
        )
    record_set.records = records
    return record_set


def _image_names(image: dict) -> list[str]:
    name = image.get("file_name")
    return [name] if isinstance(name, str) and name else []


def _boxes(
    image: dict, instances: Instances, record_set: RecordSet
) -> tuple[list[tuple[float, float, float, float]], list[int]]:
    boxes, category_ids = [], []
    seen = set()
    for annotation in instances.by_image[image["id"]]:
        example = f"annotation {annotation['id']} of image {image['id']}: {annotation.get('bbox')}"
        box = box_of(annotation, instances.url)
        flag = next((flag for flag in _FLAGS if annotation.get(flag)), None)
        if flag is not None:
            record_set.drop(_FLAGS[flag], example)
            continue
        width, height = image["width"], image["height"]
        if min(box[2], width) <= max(box[0], 0) or min(box[3], height) <= max(box[1], 0):
            record_set.drop("box empty or wholly outside the image, left out", example)
            continue
        same = (*box, annotation["category_id"])
        if same in seen:
            record_set.drop("box given twice, left out", example)
            continue
        seen.add(same)
        boxes.append(clip_box(box, image, annotation, record_set))
        category_ids.append(annotation["category_id"])
    return boxes, category_ids
