"""ImageNet-21k: photographs by WordNet id, in folders or in tars, image-level labels only."""

import csv
import io
import re
from array import array
from dataclasses import dataclass, field

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.archives import Archive
from pipeline.data.sources.columns import ColumnsBuilder
from pipeline.data.sources.files import (
    ImageFolder,
    decode_text,
    find_archive,
    in_threads,
    read_annotations,
)
from pipeline.data.sources.record import RecordSet
from pipeline.data.storage.files import list_directory
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

_COLUMNS = ("wnid", "lvis_v1_id", "lvis_name", "lvis_synset", "lvis_frequency")
_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp")
_PARTS = ("imagenet21k_small_classes", "imagenet21k_train", "imagenet21k_val")
"""Folders of ImageNet-21k-P, each with folders by wnid."""
_WNID = re.compile(r"n\d{8}")
_MAX_KEY = 80
"""A tar member name has room for 100 characters, with the extension."""

_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")


@dataclass
class _Members:
    """Files of one wnid in one tar of all of them: names (each ended by a zero), sizes, offsets."""

    names: bytearray = field(default_factory=bytearray)
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    starts: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass
class _Group:
    """The files of one wnid in one place: a folder, a tar, a tar in a tar, or members of one."""

    wnid: str
    place: str
    archive: tuple[int, int | None] | None = None
    members: _Members | None = None


@dataclass
class _Listing:
    """What a place holds: name to (size, offset or None), and what was passed over in it."""

    group: _Group
    files: dict[str, tuple[int, int | None]]
    left_out: list[tuple[str, str]]


def list_imagenet21k(source: Source, root: str) -> RecordSet:
    """One record for each image of a wnid of the `annotations`; the label is on the whole image.

    `images` is a folder with `<wnid>/` or `<wnid>.tar` in it, a tar of such tars (fall11_whole.tar)
    or of such folders, or the folder of ImageNet-21k-P, all parts of which are taken. Tars are
    read in place, and only those of wnids that are wanted.

    `annotations` is a tsv with a header of at least wnid, lvis_v1_id, lvis_name, lvis_synset and
    lvis_frequency; the category id is lvis_v1_id, and several wnids may share one. With
    `use_labels: false` it may also be a plain list, a wnid a line, or absent: then every wnid is
    taken. Wnids that it does not name are left out and counted, and so are those without images.
    """
    vocabulary, labels = read_labels(source, root)
    record_set = RecordSet(vocabulary, [])
    archive = find_archive(source, root)
    if archive is None:
        groups = _find_in_folder(ImageFolder(source, root), labels, record_set)
    else:
        groups = _find_in_archive(archive, labels, record_set)
    groups.sort(key=lambda group: (group.wnid, group.place))
    builder = ColumnsBuilder()
    wnid, taken = "", set[bytes]()
    for listing in in_threads(_list_group, groups):
        if listing.group.wnid != wnid:
            wnid, taken = listing.group.wnid, set()
        label = labels[wnid] if labels is not None and source.use_labels else UNLABELLED
        _add(listing, label, taken, builder, record_set)
    for wnid in sorted((labels or {}).keys() - {group.wnid for group in groups}):
        record_set.drop("wnid of the annotations without a folder or an archive", wnid)
    record_set.records = builder.finish()
    return record_set


def _find_in_folder(
    folder: ImageFolder, labels: dict[str, int] | None, record_set: RecordSet
) -> list[_Group]:
    """Folders and tars by wnid below the folder, or below the parts of ImageNet-21k-P."""
    groups: dict[tuple[str, str], _Group] = {}
    parts = [part for part in _PARTS if part in folder.directories]
    for url in [folder.path_of(part) for part in parts] or [folder.url]:
        files, directories = list_directory(url) if parts else (folder.files, folder.directories)
        for name in directories:
            if _is_wanted(name, labels, record_set, "folder", name):
                groups[url, name] = _Group(name, f"{url}/{name}")
        for file in sorted(files):
            wnid, dot, suffix = file.rpartition(".")
            if suffix != "tar":
                if f"{dot}{suffix}".lower() in (*_SUFFIXES, ".gz", ".tgz"):
                    record_set.drop("file outside of the folders by wnid, left out", file)
            elif (url, wnid) in groups:
                record_set.drop("archive of a wnid that has a folder too, left out", file)
            elif _is_wanted(wnid, labels, record_set, "archive", file):
                groups[url, wnid] = _Group(wnid, f"{url}/{file}", (0, None))
    return list(groups.values())


def _find_in_archive(
    url: str, labels: dict[str, int] | None, record_set: RecordSet
) -> list[_Group]:
    """Tars by wnid inside a tar, and images by the folder in it or, in none, by the tar's name."""
    inner: dict[str, _Group] = {}
    by_wnid: dict[str, _Members] = {}
    unwanted: set[str] = set()
    own = url.rsplit("/", 1)[-1].removesuffix(".tar")
    with Archive(url) as archive:
        for member in archive:
            path = member.name.removeprefix("./")
            parent, _, name = path.rpartition("/")
            if name.endswith(".tar"):
                wnid = name.removesuffix(".tar")
                if wnid in inner:
                    record_set.drop("archive given twice, the last one taken", path)
                if _is_wanted(wnid, labels, record_set, "archive", path):
                    extent = (member.offset, member.offset + member.num_bytes)
                    inner[wnid] = _Group(wnid, url, extent)
                continue
            wnid = parent.rpartition("/")[2] or own
            members = by_wnid.get(wnid)
            if members is None:
                if wnid in unwanted:
                    continue
                if not _is_wanted(wnid, labels, record_set, "folder", parent or path):
                    unwanted.add(wnid)
                    continue
                members = by_wnid[wnid] = _Members()
            members.names += name.encode() + b"\0"
            members.sizes.append(member.num_bytes)
            members.starts.append(member.offset)
    for reason, example in archive.left_out:
        record_set.drop(reason, example)
    for wnid in sorted(inner.keys() & by_wnid.keys()):
        record_set.drop("archive of a wnid that has a folder too, left out", f"{wnid}.tar")
        del inner[wnid]
    flat = [_Group(wnid, url, members=members) for wnid, members in by_wnid.items()]
    return [*inner.values(), *flat]


def _is_wanted(
    wnid: str, labels: dict[str, int] | None, record_set: RecordSet, kind: str, example: str
) -> bool:
    if labels is None:
        if not _WNID.fullmatch(wnid):
            record_set.drop(f"{kind} whose name is no wnid, left out", example)
        return _WNID.fullmatch(wnid) is not None
    if wnid not in labels:
        record_set.drop(f"{kind} whose wnid is not in the annotations, left out", example)
    return wnid in labels


def _list_group(group: _Group) -> _Listing:
    """The files of a group; later members of the same name replace earlier ones, as in tar."""
    if group.archive is None and group.members is None:
        files, _ = list_directory(group.place)
        return _Listing(group, {name: (size, None) for name, size in files.items()}, [])
    found: dict[str, tuple[int, int | None]] = {}
    left_out: list[tuple[str, str]] = []

    def take(name: str, size: int, start: int) -> None:
        if name in found:
            example = f"{name} of {group.wnid} in {group.place}"
            left_out.append(("member given twice, the last one taken", example))
        found[name] = (size, start)

    if group.members is not None:
        names = group.members.names.decode().split("\0")
        for name, size, start in zip(
            names, group.members.sizes, group.members.starts, strict=False
        ):
            take(name, size, start)
        return _Listing(group, found, left_out)
    assert group.archive is not None
    with Archive(group.place, *group.archive) as archive:
        for member in archive:
            take(member.name.rpartition("/")[2], member.num_bytes, member.offset)
    return _Listing(group, found, archive.left_out + left_out)


def _add(
    listing: _Listing,
    label: int,
    taken: set[bytes],
    builder: ColumnsBuilder,
    record_set: RecordSet,
) -> None:
    """The images of a place, by name; `taken` are the keys that its wnid has so far."""
    wnid = listing.group.wnid
    for reason, example in listing.left_out:
        record_set.drop(reason, example)
    names: list[str] = []
    keys: list[bytes] = []
    sizes, starts = [], []
    for name, (size, start) in sorted(listing.files.items()):
        stem, dot, suffix = name.rpartition(".")
        if f"{dot}{suffix}".lower() not in _SUFFIXES:
            record_set.drop("file that is no image by its name, left out", f"{wnid}/{name}")
            continue
        key = _key(wnid, stem, len(builder) + len(keys), taken)
        taken.add(key)
        keys.append(key)
        names.append(name)
        sizes.append(size)
        starts.append(start)
    place: dict[str, list] = {"names": names}
    if any(start is not None for start in starts):
        place = {"starts": starts}
    builder.add(listing.group.place, keys=keys, num_bytes=sizes, labels=label, **place)


def _key(wnid: str, stem: str, position: int, taken: set[bytes]) -> bytes:
    """A name inside the tar: no dot, since a dot ends the key; unique among those of its wnid."""
    stem = stem.removeprefix(f"{wnid}_")
    key = _NOT_IN_KEYS.sub("_", f"{wnid}_{stem}")[:_MAX_KEY].encode()
    return b"%b-%d" % (key, position) if key in taken else key


def read_labels(source: Source, root: str) -> tuple[Vocabulary, dict[str, int] | None]:
    """The categories, and the category id of each wnid that is wanted; None where all are."""
    if source.annotations is None:
        return Vocabulary([]), None
    url, data = read_annotations(source, root)
    text = decode_text(url, data)
    lines = text.split()
    if all(map(_WNID.fullmatch, lines)) and lines:
        if source.use_labels:
            raise RecipeError(
                f"source {source.name}: {url} lists wnids without categories; give a tsv with the "
                f"columns {', '.join(_COLUMNS)}, or set `use_labels: false`"
            )
        return Vocabulary([]), dict.fromkeys(lines, UNLABELLED)
    categories, by_wnid = _read_table(url, text)
    return Vocabulary(categories), by_wnid


def _read_table(url: str, text: str) -> tuple[list[Category], dict[str, int]]:
    reader = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
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
