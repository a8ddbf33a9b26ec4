"""ImageNet-21k: one folder of photographs for each WordNet id, image-level labels only."""

import csv
import io
import re

import numpy as np

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.files import ImageFolder, decode_text, read_annotations
from pipeline.data.sources.record import Record, RecordSet
from pipeline.data.vocabulary import Category, Vocabulary
from pipeline.errors import DataError
from pipeline.recipe import Source

_COLUMNS = ("wnid", "lvis_v1_id", "lvis_name", "lvis_synset", "lvis_frequency")
_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp"}
_MAX_KEY = 80
"""A tar member name has room for 100 characters, with the extension."""


def list_imagenet21k(source: Source, root: str) -> RecordSet:
    """One record for each file of `images`/<wnid>, for the wnids of the `annotations` tsv.

    The tsv has a header with at least wnid, lvis_v1_id, lvis_name, lvis_synset and
    lvis_frequency; the category id is lvis_v1_id, and several wnids may share one. Folders that it
    does not name are left out and counted, and so are wnids without a folder. The label stands on
    the whole image, as a coarse box.
    """
    categories, by_wnid = _read_table(*read_annotations(source, root))
    folder = ImageFolder(source, root)
    record_set = RecordSet(Vocabulary(categories), [])
    records: list[Record] = []
    for wnid in folder.directories:
        if wnid not in by_wnid:
            record_set.drop("folder whose wnid is not in the annotations, left out", wnid)
            continue
        label = by_wnid[wnid] if source.use_labels else UNLABELLED
        keys: set[str] = set()
        for name, num_bytes in sorted(folder.files_in(wnid).items()):
            stem, dot, suffix = name.rpartition(".")
            if dot + suffix.lower() not in _SUFFIXES:
                record_set.drop("file that is no image by its name, left out", f"{wnid}/{name}")
                continue
            key = _key(wnid, stem, len(records), keys)
            keys.add(key)
            records.append(
                Record(
                    key=key,
                    path=folder.path_of(f"{wnid}/{name}"),
                    image_id=len(records),
                    boxes=None,
                    category_ids=np.array([label], dtype=np.int64),
                    coarse=True,
                    num_bytes=num_bytes,
                )
            )
    for wnid in sorted(by_wnid.keys() - set(folder.directories)):
        record_set.drop("wnid of the annotations without a folder", wnid)
    record_set.records = records
    return record_set


def _key(wnid: str, stem: str, position: int, taken: set[str]) -> str:
    """A name inside the tar: no dot, since a dot ends the key; unique in its folder."""
    stem = stem.removeprefix(f"{wnid}_")
    key = re.sub(r"[^A-Za-z0-9_-]", "_", f"{wnid}_{stem}")[:_MAX_KEY]
    return f"{key}-{position}" if key in taken else key


def _read_table(url: str, data: bytes) -> tuple[list[Category], dict[str, int]]:
    reader = csv.DictReader(
        io.StringIO(decode_text(url, data)), delimiter="\t", quoting=csv.QUOTE_NONE
    )
    missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(
            f"{url}: the header lacks {', '.join(missing)}; it must be a tab-separated table with "
            f"the columns {', '.join(_COLUMNS)}"
        )
    categories: dict[int, Category] = {}
    by_wnid: dict[str, int] = {}
    for row in reader:
        where = f"{url}, line {reader.line_num}"
        wnid, number = row["wnid"], row["lvis_v1_id"]
        if number is None or not number.isdecimal():
            raise DataError(f"{where}: lvis_v1_id {number!r} must be an integer of at least 0")
        if not wnid or wnid in by_wnid:
            raise DataError(f"{where}: wnid {wnid!r} is empty or given twice; keep one line")
        category = Category(
            id=int(number),
            name=row["lvis_name"] or "",
            synset=row["lvis_synset"] or None,
            frequency=row["lvis_frequency"] or None,  # type: ignore[arg-type]
        )
        if categories.setdefault(category.id, category) != category:
            raise DataError(
                f"{where}: category {category.id} is {category.name!r} here and "
                f"{categories[category.id].name!r} before; an id has one name, synset and frequency"
            )
        by_wnid[wnid] = category.id
    return list(categories.values()), by_wnid
