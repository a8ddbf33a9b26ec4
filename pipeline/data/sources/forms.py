"""What an annotation json is by its looks, so that another data set's file is refused by name."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from pipeline.errors import DataError

_LOOKED_AT = 1000
"""Entries of a list that are looked at; published files are uniform."""

_NAMES = {
    "lvis": "LVIS annotations",
    "coco": "COCO instances",
    "objects365": "Objects365 annotations",
    "visual_genome": "Visual Genome objects",
}
_COCO_NAME = re.compile(r"(COCO_[a-z]+2014_)?\d{12}\.jpg")
_OBJECTS365_PREFIXES = ("objects365_", "obj365_")


def refuse_other_form(wanted: str, tree: object, url: str) -> None:
    """Raises `DataError` when a parsed json is of another form than that of format `wanted`.

    A file that nothing is known of passes: a user's own data set in COCO's form, for one.
    """
    found, form = _look(tree)
    if form == wanted or not found:
        return
    fix = (
        f"write `format: {form}`, or give `annotations` the file of {_NAMES[wanted]}"
        if form is not None
        else f"`annotations` of format {wanted} is the file of {_NAMES[wanted]}"
    )
    raise DataError(f"{url}: this looks like {found}, not like {_NAMES[wanted]}; {fix}")


def _look(tree: object) -> tuple[str, str | None]:
    """What a json looks like, empty where it looks like nothing known, and its format if any."""
    form = _form_of_list(tree) if isinstance(tree, list) else _form_of_object(tree)
    if form in _NAMES:
        return _NAMES[form], form
    return form, None


def _form_of_list(tree: list[object]) -> str:
    keys = next((set(entry) for entry in tree if isinstance(entry, dict)), set())
    if "objects" in keys:
        # Scene graphs hold the same objects beside their relationships.
        return "visual_genome" if "relationships" not in keys else "Visual Genome scene graphs"
    for key in ("relationships", "regions", "attributes", "qas"):
        if key in keys:
            return f"Visual Genome {key}"
    if {"image_id", "width", "url"} <= keys:
        return "Visual Genome image_data.json"
    if {"image_id", "category_id", "score"} <= keys:
        return "detections"
    return ""


def _form_of_object(tree: object) -> str:
    annotations = list(_entries(tree, "annotations"))
    if any("caption" in entry for entry in annotations):
        return "captions"
    if any("segments_info" in entry for entry in annotations):
        return "panoptic segments"
    images = list(_entries(tree, "images"))
    if any("neg_category_ids" in image for image in images):
        return "lvis"
    names = [PurePosixPath(str(image.get("file_name") or "")).name for image in images]
    if any(name.startswith(_OBJECTS365_PREFIXES) for name in names):
        return "objects365"
    hosts = {urlsplit(str(image.get("coco_url") or "")).netloc for image in images}
    if any(map(_COCO_NAME.fullmatch, names)) or any("coco" in host for host in hosts):
        return "coco"
    return ""


def _entries(tree: object, part: str) -> Iterator[dict]:
    entries = tree.get(part) if isinstance(tree, dict) else None
    if isinstance(entries, list):
        yield from (entry for entry in entries[:_LOOKED_AT] if isinstance(entry, dict))
