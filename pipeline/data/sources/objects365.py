"""Objects365 (Shao et al. 2019): 365 categories, boxes on every instance.

v1 has its images in one folder; v2 has more of them, in patches, and other category ids.
"""

from pathlib import PurePosixPath

from pipeline.data.sources.instances import (
    CROWD,
    Instances,
    exhaustive_record,
    find_images,
    read_instances,
)
from pipeline.data.sources.record import RecordSet
from pipeline.errors import DataError
from pipeline.recipe import Source

ABSENT_IMAGES = frozenset(
    {
        "objects365_v1_00320532.jpg",
        "objects365_v1_00320534.jpg",
        "objects365_v2_00908726.jpg",
    }
)
"""Images of `zhiyuan_objv2_train.json` that the published archives lack (patch6 and patch16).

Stated by MMDetection (`mmdet/datasets/objects365.py`) and, alike, by EasyCV.
"""

_NUM_CATEGORIES = 365
_SOME_OF_V2 = {4: "Other Shoes", 33: "Necklace", 80: "Mirror"}
"""Categories that are known to have these ids in v2 and others in v1."""


def list_objects365(source: Source, root: str) -> RecordSet:
    """One record for each image of an Objects365 json, in ascending image id.

    `file_name` is looked for under `images` with and without its leading folders
    (`images/v1/patch8/x.jpg`, `patch8/x.jpg`, `x.jpg`). The published files hold boxes that are
    crowds, empty, outside or given twice: those are left out and counted, and so are images that
    are known to be missing (`ABSENT_IMAGES`). `keep_flagged` keeps the crowds. Boxes flagged
    `isfake` (a picture or toy of the thing) and `isreflected` stay, since they look like their
    category. Raises `DataError` where categories of one version go with images of the other.
    """
    instances = read_instances(source, root)
    _check_version(instances)
    record_set = RecordSet(instances.vocabulary, [])
    flags = {"ignore": "box marked `ignore`, left out"}
    if not source.keep_flagged:
        flags["iscrowd"] = CROWD
    records = []
    for found in find_images(source, root, instances, _image_names):
        image, path, num_bytes = found
        if num_bytes is None and PurePosixPath(path).name in ABSENT_IMAGES:
            record_set.drop(
                "image that the published archives are known to lack, left out",
                f"image {image['id']}: {image['file_name']}",
            )
            continue
        records.append(exhaustive_record(source, instances, record_set, found, flags))
    record_set.records = records
    return record_set


def _image_names(image: dict) -> list[str]:
    name = image.get("file_name")
    return [name] if isinstance(name, str) and name else []


def _check_version(instances: Instances) -> None:
    """Refuse the ids of v1 on images of v2, and the other way: 4 is a hat or a shoe."""
    categories = {category.id: category for category in instances.vocabulary.categories}
    if len(categories) != _NUM_CATEGORIES:
        return
    names = [PurePosixPath(name).name for image in instances.images for name in _image_names(image)]
    v2_images = [name for name in names if name.startswith("objects365_v")]
    v1_images = [name for name in names if name.startswith("obj365_")]
    is_v2 = all(
        number in categories and categories[number].name.casefold() == name.casefold()
        for number, name in _SOME_OF_V2.items()
    )
    wrong, own, other = (v1_images, 2, 1) if is_v2 else (v2_images, 1, 2)
    if wrong:
        raise DataError(
            f"{instances.url}: its categories are those of Objects365 v{own}, and {wrong[0]} is an "
            f"image of v{other}; the two give the same ids to other things. Use the json that was "
            f"published with the images (zhiyuan_objv2_*.json with v2), in a source of its own"
        )
