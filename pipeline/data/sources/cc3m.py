"""Conceptual Captions (Sharma et al. 2018): captions of web images, no boxes and no classes."""

import csv
import io
from collections import Counter
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import numpy as np

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.files import ImageFolder, decode_text, read_annotations
from pipeline.data.sources.record import Record, RecordSet
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import DataError
from pipeline.recipe import Source

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def list_cc3m(source: Source, root: str) -> RecordSet:
    """One record for each row of the `annotations` whose image is in `images`, in row order.

    The annotations are the published tsv, `caption<TAB>url or path` without a header; or a csv
    with the columns ImageID and Title (the credits of the challenge's sample images), where titles
    stand for captions and the image is `images`/<ImageID>.jpg.

    The image of row i (from 0) is the file named as the last part of its url where only that row
    ends so, or the file named by the number, `00000012.jpg`. One rule holds for the whole folder:
    the one that finds more images. Rows without an image (most links of the published file are
    dead by now), an ambiguous name or a caption are left out and counted.
    """
    url, data = read_annotations(source, root)
    text = decode_text(url, data)
    if url.endswith(".csv"):
        rows = _read_credits(url, text)
    else:
        rows = _read_pairs(url, text)
    folder = ImageFolder(source, root)
    record_set = RecordSet(Vocabulary([]), [])
    names = _choose_names([location for _, location in rows], folder.files)
    records = []
    for i, ((caption, location), name) in enumerate(zip(rows, names, strict=True)):
        example = f"row {i}: {location}"
        if name is None:
            record_set.drop("row whose image is absent, left out", example)
        elif not caption:
            record_set.drop("row without a caption, left out", example)
        else:
            records.append(
                Record(
                    key=f"{i:08d}",
                    path=folder.path_of(name),
                    image_id=i,
                    boxes=None,
                    category_ids=np.array([UNLABELLED], dtype=np.int64),
                    coarse=True,
                    caption=caption,
                    num_bytes=folder.files[name],
                )
            )
    record_set.records = records
    return record_set


def _choose_names(locations: list[str], files: dict[str, int]) -> list[str | None]:
    """The file of each row, or None, by the one of the two rules that finds more."""
    last_parts = [PurePosixPath(urlsplit(location).path).name for location in locations]
    occurrences = Counter(last_parts)
    by_last_part = [
        part if part in files and occurrences[part] == 1 else None for part in last_parts
    ]
    by_number = [
        next((f"{i:08d}{suffix}" for suffix in _SUFFIXES if f"{i:08d}{suffix}" in files), None)
        for i in range(len(locations))
    ]
    return max(by_last_part, by_number, key=lambda names: sum(name is not None for name in names))


def _read_pairs(url: str, text: str) -> list[tuple[str, str]]:
    rows = []
    # Not splitlines(), which also ends a line at the rare separators inside captions.
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        caption, *rest = line.split("\t")
        if len(rest) != 1 or not rest[0].strip():
            raise DataError(
                f"{url}, line {number}: {line[:80]!r} must be a caption, one tab, and a url or path"
            )
        rows.append((caption.strip(), rest[0].strip()))
    return rows


def _read_credits(url: str, text: str) -> list[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(text))
    missing = {"ImageID", "Title"} - set(reader.fieldnames or ())
    if missing:
        raise DataError(
            f"{url}: the header lacks {', '.join(sorted(missing))}; a caption csv has the columns "
            "ImageID and Title, and the published form is a tsv without a header"
        )
    return [((row["Title"] or "").strip(), f"{row['ImageID']}.jpg") for row in reader]
