"""Pascal VOC 2007 and 2012 (Everingham et al. 2010): 20 categories, one xml for each image."""

import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from xml.etree import ElementTree

import numpy as np

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.files import ImageFolder, decode_text, in_threads, read_annotations
from pipeline.data.sources.instances import Box, box_array, clip_box
from pipeline.data.sources.record import Record, RecordSet
from pipeline.data.storage.files import read_bytes
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""The development kit's order; ids are 1 to 20."""

_ID_OF = {name: number for number, name in enumerate(CATEGORIES, start=1)}
_MAX_XML = 1 << 20
"""Bytes; published files have a few thousand."""


def list_voc(source: Source, root: str) -> RecordSet:
    """One record for each image of a split, in the order of its file.

    `annotations` is a file of ImageSets/Main with one name in a line (train.txt, trainval.txt),
    `images` is JPEGImages, and the xml files are in the folder Annotations beside it. Coordinates
    count pixels from 1 and include both ends, so `xmin` 1 and `xmax` 10 are the first ten pixels.
    `difficult` objects are left out and counted, and their category is then not exhaustively
    boxed, unless `keep_flagged`. Parts of objects (head, hand, foot) are no objects.
    """
    url, data = read_annotations(source, root)
    names = list(_read_split(url, decode_text(url, data)))
    folder = ImageFolder(source, root)
    vocabulary = Vocabulary([Category(id=number, name=name) for name, number in _ID_OF.items()])
    record_set = RecordSet(vocabulary, [])
    urls = [f"{_annotation_folder(folder.url)}/{name}.xml" for name in names]
    records = []
    for name, xml_url, xml in zip(names, urls, in_threads(_read_xml, urls), strict=True):
        tree = _parse(xml_url, xml)
        size, boxes, category_ids, difficult = _objects(source, tree, xml_url, record_set)
        found = folder.find(f"{name}.jpg")
        path, num_bytes = found or (f"{name}.jpg", None)
        if not source.use_labels:
            category_ids, difficult = [UNLABELLED] * len(category_ids), set()
        records.append(
            Record(
                key=name,
                path=folder.path_of(path),
                image_id=int(name.replace("_", "")),
                boxes=box_array(boxes),
                category_ids=np.array(category_ids, dtype=np.int64),
                not_exhaustive_category_ids=tuple(sorted(difficult)),
                declared_size=size,
                num_bytes=num_bytes,
            )
        )
    record_set.records = records
    if records and all(record.num_bytes is None for record in records):
        raise RecipeError(
            f"source {source.name}: none of the {len(records)} images of {url} is in `images` "
            f"{source.images!r} at {folder.url}; the first was looked for as {names[0]}.jpg"
        )
    return record_set


def _read_split(url: str, text: str) -> Iterator[str]:
    seen = set()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{url}, line {number}: {line[:80]!r}"
        if len(words) > 1 and words[0].replace("_", "").isdecimal():
            raise DataError(
                f"{where}: this is the split of one category; take the file that has names alone "
                "(train.txt, val.txt, trainval.txt, test.txt)"
            )
        if len(words) > 1 or not words[0].replace("_", "").isdecimal():
            raise DataError(
                f"{where} must be the name of an image (000005, 2008_000008); `annotations` of "
                "format voc is a file of ImageSets/Main"
            )
        if words[0] in seen:
            raise DataError(f"{where} is given twice; keep one line")
        seen.add(words[0])
        yield words[0]


def _annotation_folder(images: str) -> str:
    """The folder Annotations beside JPEGImages, of a path or URL."""
    return f"{images.rstrip('/').rsplit('/', 1)[0]}/Annotations"


def _read_xml(url: str) -> bytes:
    try:
        data = read_bytes(url)
    except FileNotFoundError:
        raise DataError(
            f"{url}: the annotation of an image of the split is not there; `images` must be the "
            "folder JPEGImages, with Annotations beside it"
        ) from None
    if len(data) > _MAX_XML:
        raise DataError(f"{url}: {len(data)} bytes are no annotation of VOC (at most {_MAX_XML})")
    return data


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses a document type before any entity of it is read: entities can expand or lead out."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("a DOCTYPE, which no file of VOC has; entities are not expanded")


def _parse(url: str, data: bytes) -> ElementTree.Element:
    parser = ElementTree.XMLParser(target=_WithoutDoctype())
    try:
        parser.feed(data)
        tree: ElementTree.Element = parser.close()
    except DataError as error:
        raise DataError(f"{url}: holds {error}") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"{url}: not valid xml ({error}); download it again") from None
    if tree.tag != "annotation":
        raise DataError(f"{url}: the root is <{tree.tag}>, and VOC has <annotation>")
    file_name = (tree.findtext("filename") or "").strip()
    if PurePosixPath(file_name).stem != PurePosixPath(url).stem:
        raise DataError(
            f"{url}: <filename> is {file_name!r}; it is the annotation of another image"
        )
    return tree


def _objects(
    source: Source, tree: ElementTree.Element, url: str, record_set: RecordSet
) -> tuple[tuple[int, int], list[Box], list[int], set[int]]:
    """Size of the image, boxes and category ids, and the categories of what was left out."""
    width, height = (int(_number(tree, f"size/{side}", url)) for side in ("width", "height"))
    if width < 1 or height < 1:
        raise DataError(f"{url}: size {width}x{height} must be positive")
    image = {"id": PurePosixPath(url).stem, "width": width, "height": height}
    boxes, category_ids, left_out = [], [], set()
    for position, entry in enumerate(tree.findall("object"), start=1):
        where = f"{url}: object {position}"
        name = (entry.findtext("name") or "").strip()
        if name not in _ID_OF:
            raise DataError(f"{where}: {name!r} is none of VOC's categories {', '.join(_ID_OF)}")
        corners = [_number(entry, f"bndbox/{side}", where) for side in _SIDES]
        shown = {"id": position, "bbox": corners}
        if (entry.findtext("difficult") or "0").strip() == "1" and not source.keep_flagged:
            record_set.drop(
                "object marked difficult, left out", f"object {position} of image {image['id']}"
            )
            left_out.add(_ID_OF[name])
            continue
        box = (corners[0] - 1, corners[1] - 1, corners[2], corners[3])
        box = clip_box(box, image, shown, record_set)
        if box[2] <= box[0] or box[3] <= box[1]:
            raise DataError(
                f"{where}: xmin, ymin, xmax, ymax {corners} is empty inside its image of "
                f"{width}x{height} pixels; remove or correct it"
            )
        boxes.append(box)
        category_ids.append(_ID_OF[name])
    return (width, height), boxes, category_ids, left_out


_SIDES = ("xmin", "ymin", "xmax", "ymax")


def _number(element: ElementTree.Element, path: str, where: str) -> float:
    text = element.findtext(path)
    try:
        # Some files of 2012 have fractions of pixels.
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: <{path}> {text!r} must be a number")
    return number
