"""Conceptual Captions (Sharma et al. 2018) and CC12M (Changpinyo et al. 2021): captioned images."""

import csv
import io
import itertools
from collections.abc import Callable, Iterator

from pipeline.data.sources.caption_tars import add_tars
from pipeline.data.sources.columns import ColumnsBuilder
from pipeline.data.sources.files import ImageFolder, decode_text, read_annotations
from pipeline.data.sources.mentions import CategoryFinder, label_captions, read_finder
from pipeline.data.sources.record import RecordSet
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_HEADERS = {("caption", "url"): False, ("url", "caption"): True}
_NUM_LOOKED_AT = 10

Rows = Callable[[], Iterator[tuple[str, str]]]
"""(caption, url or path) of every row, each time that it is called."""


def list_captions(source: Source, root: str) -> RecordSet:
    """One record for each image with a caption; no boxes, and no classes but what captions name.

    Without `annotations`, `images` is what img2dataset writes: a folder of WebDataset tars, or one
    tar (`add_tars`). With them, `images` is a folder and they are the published tsv,
    `caption<TAB>url` (cc3m) or `url<TAB>caption` (cc12m), with or without a header; or a csv with
    the columns ImageID and Title (the credits of the challenge's sample images), where titles stand
    for captions and the image is `images`/<ImageID>.jpg.

    With `files.classes`, the categories that a caption names (`CategoryFinder`) are its labels,
    each on the whole image; captions that name none are kept without a label and counted.
    """
    finder = read_finder(source, root)
    record_set = RecordSet(Vocabulary([]) if finder is None else finder.vocabulary, [])
    builder = ColumnsBuilder()
    if source.annotations is None:
        add_tars(source, root, finder, builder, record_set)
    else:
        _add_rows(source, root, finder, builder, record_set)
    record_set.records = builder.finish()
    return record_set


def _add_rows(
    source: Source,
    root: str,
    finder: CategoryFinder | None,
    builder: ColumnsBuilder,
    record_set: RecordSet,
) -> None:
    """Records of the rows whose image is in `images`, in row order.

    The image of row i (from 0) is the file named as the last part of its url where only that row
    ends so, or the file named by the number, `00000012.jpg`. One rule holds for the whole folder:
    the one that finds more images. Rows without an image (most links of the published files are
    dead by now), an ambiguous name or a caption are left out and counted.
    """
    url, data = read_annotations(source, root)
    rows = _read_credits(url, data) if url.endswith(".csv") else _read_pairs(url, data, source)
    folder = ImageFolder(source, root)
    chosen = _choose_files(rows, folder.files)
    if not chosen and any(file.endswith(".tar") for file in folder.files):
        raise RecipeError(
            f"source {source.name}: {folder.url} holds tars, whose captions are inside; leave out "
            "`annotations`"
        )
    numbers: list[int] = []
    captions: list[str] = []
    for i, (caption, location) in enumerate(rows()):
        if i not in chosen:
            record_set.drop("row whose image is absent, left out", f"row {i}: {location}")
        elif not caption:
            record_set.drop("row without a caption, left out", f"row {i}: {location}")
        else:
            numbers.append(i)
            captions.append(caption)
    names = [chosen[i] for i in numbers]
    builder.add(
        folder.url,
        keys=[b"%08d" % i for i in numbers],
        names=names,
        num_bytes=[folder.files[name] for name in names],
        image_ids=numbers,
        captions=[caption.encode() for caption in captions],
        labels=label_captions(captions, finder, record_set),
    )


def _choose_files(rows: Rows, files: dict[str, int]) -> dict[int, str]:
    """The file of each row that has one, by the one of the two rules that finds more."""
    by_last_part: dict[str, int] = {}
    count = 0
    for i, (_, location) in enumerate(rows()):
        last = location.split("?", 1)[0].split("#", 1)[0].rpartition("/")[2]
        if last in files:
            by_last_part[last] = -1 if last in by_last_part else i
        count = i + 1
    by_number: dict[int, str] = {}
    for suffix in reversed(_SUFFIXES):
        for file in files:
            stem = file.removesuffix(suffix)
            if len(stem) == 8 and stem != file and stem.isdecimal() and int(stem) < count:
                by_number[int(stem)] = file
    unambiguous = {i: file for file, i in by_last_part.items() if i >= 0}
    return max(unambiguous, by_number, key=len)


def _read_pairs(url: str, data: bytes, source: Source) -> Rows:
    """The rows of a tsv; the file stays bytes, since the text of twelve million rows is large."""
    first = next(_iter_fields(url, data, 0), None)
    if first is None:
        raise DataError(f"{url}: the file is empty; download it again")
    header = _HEADERS.get((first[0].strip().lower(), first[1].strip().lower()))
    swapped = source.format == "cc12m" if header is None else header

    def rows() -> Iterator[tuple[str, str]]:
        for left, right in _iter_fields(url, data, 0 if header is None else 1):
            caption, location = (right, left) if swapped else (left, right)
            if not location.strip():
                raise DataError(f"{url}: a row with the text {caption[:80]!r} has no url or path")
            yield caption.strip(), location.strip()

    _check_order(url, rows())
    return rows


def _iter_fields(url: str, data: bytes, skip: int) -> Iterator[tuple[str, str]]:
    blank = 0
    # Lines end at line feeds alone: captions hold rarer separators.
    for number, line in enumerate(io.BytesIO(data), start=1):
        line = line.removesuffix(b"\n")
        if number <= skip:
            continue
        if not line and number > 1:
            blank = blank or number
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{url}, line {number}: not UTF-8 text; convert the file") from None
        left, *rest = text.split("\t")
        if len(rest) != 1 or blank:
            shown, where = ("", blank) if blank else (text[:80], number)
            raise DataError(
                f"{url}, line {where}: {shown!r} must be a caption, one tab, and a url or path (in "
                "CC12M the url is first)"
            )
        yield left, rest[0]


def _check_order(url: str, rows: Iterator[tuple[str, str]]) -> None:
    shown = [caption for caption, _ in itertools.islice(rows, _NUM_LOOKED_AT)]
    if shown and all(caption.startswith(("http://", "https://")) for caption in shown):
        raise DataError(
            f"{url}: urls stand where captions should; CC3M's file is caption<TAB>url (format "
            "cc3m), CC12M's is url<TAB>caption (format cc12m)"
        )


def _read_credits(url: str, data: bytes) -> Rows:
    reader = csv.DictReader(io.StringIO(decode_text(url, data)))
    missing = {"ImageID", "Title"} - set(reader.fieldnames or ())
    if missing:
        raise DataError(
            f"{url}: the header lacks {', '.join(sorted(missing))}; a caption csv has the columns "
            "ImageID and Title, and the published form is a tsv without a header"
        )
    rows = [((row["Title"] or "").strip(), f"{row['ImageID']}.jpg") for row in reader]
    return lambda: iter(rows)
