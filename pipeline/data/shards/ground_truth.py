"""Ground truth in COCO's form of data sets that are published in another: `prepare` writes it
beside the shards of a validation source, and evaluation reads it there.

Images and categories have the ids of the index, and boxes are those of the samples, so that nothing
is left to match. Boxes around groups are crowd regions, as COCO has them.
"""

import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.index import Index
from pipeline.data.sources.record import Record, RecordSet
from pipeline.data.storage.files import exists, publish_bytes, read_bytes
from pipeline.errors import StorageError

FILE = "ground_truth.json"


def write_ground_truth(index: Index, record_set: RecordSet) -> None:
    """Write the boxes of the records that the index has; images that were unreadable have none."""
    places = {int(image_id): i for i, image_id in enumerate(index.image_id)}
    records = [record for record in record_set.records if record.image_id in places]
    sizes = {k: (int(index.width[i]), int(index.height[i])) for k, i in places.items()}
    annotations = [
        {"image_id": record.image_id, "category_id": category_id, "bbox": bbox}
        for record in records
        for category_id, bbox in zip(
            record.category_ids.tolist(),
            _xywh(_boxes_of(record, index, places[record.image_id], sizes[record.image_id])),
            strict=True,
        )
    ]
    annotations += _groups(record_set, sizes)
    tree = {
        "index": index.digest,
        "images": [
            {
                "id": record.image_id,
                "file_name": record.path.rsplit("/", 1)[-1],
                "width": sizes[record.image_id][0],
                "height": sizes[record.image_id][1],
            }
            for record in records
        ],
        "categories": [
            {"id": category.id, "name": category.name}
            | ({} if category.image_count is None else {"image_count": category.image_count})
            for category in index.vocabulary.categories
        ],
        "annotations": [{"id": k, **row} for k, row in enumerate(annotations, start=1)],
    }
    url, text = f"{index.url}/{FILE}", json.dumps(tree, separators=(",", ":")).encode()
    # What is there stays: the folder may be one that can only be read.
    if not exists(url) or read_bytes(url) != text:
        publish_bytes(url, text)


def load_ground_truth(index: Index) -> dict[str, list[dict]]:
    """The tree that was written with an index; raises `StorageError` where it is not there."""
    url = f"{index.url}/{FILE}"
    by = f"`longtail prepare` writes it, of a recipe with {index.name} as data.validation"
    try:
        tree = json.loads(read_bytes(url))
    except FileNotFoundError:
        raise StorageError(f"{url} is missing; {by}: run it where the raw data are") from None
    except ValueError:
        raise StorageError(f"{url} is damaged; {by}: run it again") from None
    if not isinstance(tree, dict) or tree.get("index") != index.digest:
        raise StorageError(f"{url} is of other shards than those beside it; {by}: run it again")
    return {key: tree[key] for key in ("images", "categories", "annotations")}


def _boxes_of(
    record: Record, index: Index, place: int, size: tuple[int, int]
) -> NDArray[np.float32]:
    """(N, 4) xyxy in pixels of the image as people see it."""
    assert record.boxes is not None, "a format with boxes"
    if record.relative_boxes:
        return record.boxes * np.array(size * 2, dtype=np.float32)
    if record.declared_size != size:
        # The image is turned by EXIF; when it was read, its boxes were turned with it.
        return index.read(place).boxes
    return record.boxes


def _groups(record_set: RecordSet, sizes: dict[int, tuple[int, int]]) -> Iterator[dict]:
    groups = record_set.groups
    if groups is None:
        return
    known = np.isin(groups.image_ids, list(sizes))
    image_ids, category_ids = groups.image_ids[known].tolist(), groups.category_ids[known].tolist()
    scale = np.array([sizes[k] * 2 for k in image_ids], dtype=np.float32).reshape(-1, 4)
    for image_id, category_id, bbox in zip(
        image_ids, category_ids, _xywh(groups.boxes[known] * scale), strict=True
    ):
        marks = {"iscrowd": 1, "isgroupof": 1}
        yield {"image_id": image_id, "category_id": category_id, "bbox": bbox, **marks}


def _xywh(boxes: NDArray[np.float32]) -> list[list[float]]:
    """Of corners; in float64, where differences of float32 are exact enough for any threshold."""
    wide = boxes.astype(np.float64)
    rows: list[list[float]] = np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1).tolist()
    return rows
