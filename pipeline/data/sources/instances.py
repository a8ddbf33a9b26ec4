"""COCO-like json, which LVIS, COCO and Objects365 share: reading it, refusing what is wrong."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.files import ImageFolder, read_text
from pipeline.data.sources.forms import refuse_other_form
from pipeline.data.sources.record import Record, RecordSet
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

CLIP_TOLERANCE = 0.01
"""Pixels by which a box may overstep its image uncounted: files round to hundredths."""

CROWD = "box around a crowd, left out"
_READ_OF_BOXES = ("id", "image_id", "category_id", "bbox", "iscrowd", "ignore", "score")
_NAME_OF_2014 = re.compile(r"COCO_(?:train|val|test)2014_(\d{12}\.\w+)")


Box = tuple[float, float, float, float]
"""xyxy, in pixels."""


@dataclass
class Instances:
    """The checked parts of one annotation file; `by_image` keeps the order of the file."""

    url: str
    vocabulary: Vocabulary
    category_ids: frozenset[int]
    images: list[dict]
    by_image: dict[int, list[dict]]


def read_instances(source: Source, root: str) -> Instances:
    """Read the json and check its ids; raises `DataError` naming file, id, value, rule and fix."""
    url, tree = read_json(source, root, "annotations", source.annotations)
    refuse_other_form(source.format, tree, url)
    categories, images, annotations = (
        _entries(tree, url, part) for part in ("categories", "images", "annotations")
    )
    vocabulary = _read_vocabulary(categories, url)
    known = frozenset(vocabulary.ids)
    by_image: dict[int, list[dict]] = {}
    for image in images:
        by_image[image["id"]] = []
        for side in ("width", "height"):
            if type(image.get(side)) is not int or image[side] < 1:
                raise DataError(
                    f"{url}: image {image['id']}: {side} {image.get(side)!r} must be a positive "
                    "integer"
                )
    for annotation in annotations:
        where = f"{url}: annotation {annotation['id']}"
        if annotation.get("image_id") not in by_image:
            raise DataError(
                f"{where}: image_id {annotation.get('image_id')!r} is none of the file's images"
            )
        if annotation.get("category_id") not in known:
            raise DataError(f"{where}: {_unknown(vocabulary, annotation.get('category_id'))}")
        by_image[annotation["image_id"]].append(annotation)
    return Instances(url, vocabulary, known, images, by_image)


def read_json(source: Source, root: str, key: str, path: str | None) -> tuple[str, object]:
    """Where the json file of a `key` of the source is, and its content without masks.

    Raises `RecipeError` when it is not there, `DataError` that names it when it cannot be parsed.
    """
    # The bytes are gone before the parsing: those of Objects365 are gigabytes.
    url, text = read_text(source, root, key, path)
    return url, parse_json(url, text, _slim)


def parse_json(url: str, text: str, entry_hook: Callable[[dict], dict]) -> object:
    """The json of a file, each object in it as `entry_hook` returns it; `DataError` names it."""
    try:
        return json.loads(text, object_hook=entry_hook)
    except json.JSONDecodeError as error:
        raise DataError(f"{url}: not valid json ({error}); download it again") from None
    except RecursionError:
        raise DataError(f"{url}: json nested too deeply; is it the right file?") from None


def _slim(entry: dict) -> dict:
    """An annotation with what is read of it; masks are most of LVIS and COCO, and would add up."""
    if "bbox" in entry:
        return {key: entry[key] for key in _READ_OF_BOXES if key in entry}
    return entry


def coco_names(image: dict) -> list[str]:
    """Where a COCO photograph may be: by `coco_url`, by `file_name`, by its name since 2017.

    LVIS v0.5 and COCO 2014 write `COCO_val2014_000000000042.jpg` for what COCO 2017 has as
    `train2017/000000000042.jpg` or `val2017/000000000042.jpg`.
    """
    names = [
        # Older files of COCO 2014 hold addresses of web pages, without a file.
        name
        for name in (urlsplit(str(image.get("coco_url") or "")).path.lstrip("/"),)
        if PurePosixPath(name).suffix
    ]
    file_name = image.get("file_name")
    if isinstance(file_name, str) and file_name:
        names.append(file_name)
        renamed = _NAME_OF_2014.fullmatch(PurePosixPath(file_name).name)
        if renamed is not None:
            names += [f"{folder}/{renamed[1]}" for folder in ("train2017", "val2017")]
    return names


def find_images(
    source: Source, root: str, instances: Instances, names_of: Callable[[dict], list[str]]
) -> list[tuple[dict, str, int | None]]:
    """(image, path, size in bytes) of every image, in ascending id.

    The first of its names that `images` has, with or without leading folders, is the one. An absent
    image keeps its first name and no size, and counts as unreadable when it is read; where no
    image at all is there, `RecipeError`.
    """
    folder = ImageFolder(source, root)
    images = sorted(instances.images, key=lambda image: image["id"])
    found = []
    for image in images:
        names = names_of(image)
        if not names:
            raise DataError(f"{instances.url}: image {image['id']} names no file")
        path, num_bytes = next(filter(None, map(folder.find, names)), (names[0], None))
        found.append((image, folder.path_of(path), num_bytes))
    if found and all(num_bytes is None for _, _, num_bytes in found):
        raise RecipeError(
            f"source {source.name}: none of the {len(images)} images of {instances.url} is in "
            f"`images` {source.images!r} at {folder.url}; the first was looked for as "
            f"{' and '.join(names_of(images[0]))}, with and without its leading folders"
        )
    return found


def box_of(annotation: dict, url: str) -> Box:
    """xyxy in pixels of a COCO xywh box; raises `DataError` for a box that is none."""
    box = annotation.get("bbox")
    where = f"{url}: annotation {annotation['id']}: bbox {box!r}"
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(type(value) in (int, float) for value in box)
    ):
        raise DataError(f"{where} must be four numbers: x, y, width, height")
    if not all(math.isfinite(value) for value in box):
        raise DataError(f"{where} holds a value that is not finite; remove or correct it")
    x, y, width, height = (float(value) for value in box)
    if width < 0 or height < 0:
        raise DataError(f"{where} has a negative width or height; it must be x, y, width, height")
    return x, y, x + width, y + height


def clip_box(
    box: Box,
    image: dict,
    annotation: dict,
    record_set: RecordSet,
) -> Box:
    """The part of a box that lies in its image; counted where that changes it."""
    width, height = float(image["width"]), float(image["height"])
    x0, y0, x1, y1 = box
    if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
        return box
    clipped = (
        min(max(x0, 0.0), width),
        min(max(y0, 0.0), height),
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
    )
    moved = max(abs(a - b) for a, b in zip(box, clipped, strict=True))
    if moved > CLIP_TOLERANCE:
        record_set.drop(
            "box partly outside the image, clipped",
            f"annotation {annotation['id']} of image {image['id']}: {annotation['bbox']} in "
            f"{image['width']}x{image['height']}",
        )
    return clipped


def exhaustive_record(
    source: Source,
    instances: Instances,
    record_set: RecordSet,
    found: tuple[dict, str, int | None],
    flags: Mapping[str, str],
) -> Record:
    """The record of an image on which every instance of every category is meant to be boxed.

    Boxes with one of the `flags` (key to reason) are left out; their categories are then not
    exhaustively boxed. So are boxes that are empty, outside or given twice. All are counted.
    """
    image, path, num_bytes = found
    boxes, category_ids, flagged = [], [], set()
    seen = set()
    for annotation in instances.by_image[image["id"]]:
        example = f"annotation {annotation['id']} of image {image['id']}: {annotation.get('bbox')}"
        box, category_id = box_of(annotation, instances.url), annotation["category_id"]
        flag = next((flag for flag in flags if annotation.get(flag)), None)
        if flag is not None:
            record_set.drop(flags[flag], example)
            flagged.add(category_id)
            continue
        width, height = image["width"], image["height"]
        if min(box[2], width) <= max(box[0], 0) or min(box[3], height) <= max(box[1], 0):
            record_set.drop("box empty or wholly outside the image, left out", example)
            continue
        if (*box, category_id) in seen:
            record_set.drop("box given twice, left out", example)
            continue
        seen.add((*box, category_id))
        boxes.append(clip_box(box, image, annotation, record_set))
        category_ids.append(category_id if source.use_labels else UNLABELLED)
    return Record(
        key=f"{image['id']:012d}",
        path=path,
        image_id=image["id"],
        boxes=box_array(boxes),
        category_ids=np.array(category_ids, dtype=np.int64),
        not_exhaustive_category_ids=tuple(sorted(flagged)) if source.use_labels else (),
        declared_size=(image["width"], image["height"]),
        num_bytes=num_bytes,
    )


def box_array(boxes: list[Box]) -> NDArray[np.float32]:
    """(N, 4) float32, also for no box at all."""
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def check_category_list(image: dict, part: str, instances: Instances) -> tuple[int, ...]:
    """A list of category ids of an image that LVIS's federated protocol needs."""
    where = f"{instances.url}: image {image['id']}"
    ids = image.get(part)
    if not isinstance(ids, list):
        raise DataError(
            f"{where}: `{part}` must be a list of category ids (it may be empty); without it the "
            "federated protocol of LVIS cannot be followed"
        )
    for category_id in ids:
        if type(category_id) is not int or category_id not in instances.category_ids:
            raise DataError(f"{where}: `{part}`: {_unknown(instances.vocabulary, category_id)}")
    return tuple(ids)


def read_categories(tree: object, url: str) -> Vocabulary:
    """The categories of a parsed LVIS or COCO json; raises `DataError` that names the file."""
    return _read_vocabulary(_entries(tree, url, "categories"), url)


def _entries(tree: object, url: str, part: str) -> list[dict]:
    entries = tree.get(part) if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise DataError(f"{url}: `{part}` must be a list of objects; is it the right file?")
    _check_ids(entries, url, part)
    return entries


def _check_ids(entries: list[dict], url: str, part: str) -> None:
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        number = entry.get("id")
        if type(number) is not int or number < 0:
            raise DataError(
                f"{url}: {part}[{position}]: id {number!r} must be an integer of at least 0"
            )
        if number in seen:
            raise DataError(f"{url}: {part}: id {number} is given twice; ids must differ")
        seen.add(number)


def _read_vocabulary(categories: list[dict], url: str) -> Vocabulary:
    try:
        return Vocabulary(
            [
                Category(
                    id=entry["id"],
                    name=str(entry.get("name", "")),
                    synset=entry.get("synset"),
                    frequency=entry.get("frequency"),
                    image_count=entry.get("image_count"),
                    instance_count=entry.get("instance_count"),
                    aliases=tuple(entry.get("synonyms", ())),
                )
                for entry in categories
            ]
        )
    except DataError as error:
        raise DataError(f"{url}: {error}") from None


def _unknown(vocabulary: Vocabulary, category_id: object) -> str:
    if type(category_id) is not int:
        return f"category id {category_id!r} must be an integer"
    try:
        vocabulary.column_of(category_id)
    except DataError as error:
        return str(error)
    raise AssertionError(f"category id {category_id} is known")
