"""Captioned images in WebDataset tars, as img2dataset and others write them, read in place."""

import json
import re
from dataclasses import dataclass, field

from pipeline.data.sources.archives import Archive, Member
from pipeline.data.sources.columns import ColumnsBuilder
from pipeline.data.sources.files import ImageFolder, find_archive, in_threads
from pipeline.data.sources.mentions import CategoryFinder, label_captions
from pipeline.data.sources.record import RecordSet
from pipeline.errors import RecipeError
from pipeline.recipe import Source

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_MAX_TEXT = 1 << 16
"""Bytes of a caption or of its json; img2dataset's are below two thousand."""
_MAX_KEY = 80
"""A tar member name has room for 100 characters, with the extension."""
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")


@dataclass
class _Sample:
    """The members of one sample as they are met."""

    image: Member | None = None
    text: bytes | None = None
    tree: bytes | None = None


@dataclass
class _Listing:
    """The captioned images of one tar, and what was passed over in it."""

    url: str
    keys: list[bytes] = field(default_factory=list)
    images: list[Member] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def add_tars(
    source: Source,
    root: str,
    finder: CategoryFinder | None,
    builder: ColumnsBuilder,
    record_set: RecordSet,
) -> None:
    """Records of the images in one tar or in the tars of a folder, by tar and name.

    Members are `<name>.jpg` with the caption in `<name>.txt` or, without that, as `caption` in
    `<name>.json`; the last dot ends a name. The members of a sample may stand apart. Images
    without a caption, captions without an image and what is neither are left out and counted;
    of a member given twice the last one is taken, as in unpacking. The key of a sample is
    `<tar>-<name>`.
    """
    for listing in in_threads(_list_tar, _find_tars(source, root, record_set)):
        for reason, example in listing.left_out:
            record_set.drop(reason, example)
        builder.add(
            listing.url,
            keys=listing.keys,
            starts=[image.offset for image in listing.images],
            num_bytes=[image.num_bytes for image in listing.images],
            captions=[caption.encode() for caption in listing.captions],
            labels=label_captions(listing.captions, finder, record_set),
        )


def _find_tars(source: Source, root: str, record_set: RecordSet) -> list[str]:
    archive = find_archive(source, root)
    if archive is not None:
        return [archive]
    folder = ImageFolder(source, root)
    names = sorted(name for name in folder.files if name.endswith(".tar"))
    if not names:
        raise RecipeError(
            f"source {source.name}: {folder.url} has no tar in it; without `annotations`, `images` "
            "is a folder of WebDataset tars as img2dataset writes them, or one of them"
        )
    for name in sorted(folder.files):
        if not name.endswith((".tar", "_stats.json", ".parquet")):
            record_set.drop("file beside the tars that is none, left out", name)
    return [folder.path_of(name) for name in names]


def _list_tar(url: str) -> _Listing:
    listing = _Listing(url)
    samples: dict[str, _Sample] = {}
    seen: set[str] = set()
    with Archive(url) as archive:
        for member in archive:
            if member.name in seen:
                listing.left_out.append(
                    ("member given twice, the last one taken", f"{member.name} in {url}")
                )
            seen.add(member.name)
            name, _, kind = member.name.rpartition(".")
            kind = kind.lower()
            if kind not in (*_IMAGES, "txt", "json"):
                reason = f"member that is no image and no caption (.{kind[:10]}), left out"
                listing.left_out.append((reason, f"{member.name} in {url}"))
                continue
            sample = samples.setdefault(name, _Sample())
            if kind in _IMAGES:
                if sample.image is not None and sample.image.name != member.name:
                    listing.left_out.append(
                        ("second image of a sample, left out", f"{member.name} in {url}")
                    )
                    continue
                sample.image = member
            elif member.num_bytes > _MAX_TEXT:
                reason = f"caption or json of more than {_MAX_TEXT} bytes, left out"
                listing.left_out.append((reason, f"{member.name} in {url}"))
            elif kind == "txt":
                sample.text = archive.read(member)
            else:
                sample.tree = archive.read(member)
        listing.left_out.extend(archive.left_out)
    stem = url.rsplit("/", 1)[-1].removesuffix(".tar")
    taken: set[bytes] = set()
    for name in sorted(samples):
        _add(listing, samples[name], f"{stem}-{name.removeprefix('./')}", taken)
    return listing


def _add(listing: _Listing, sample: _Sample, name: str, taken: set[bytes]) -> None:
    """A sample that is whole goes into the listing, any other among what was left out."""
    example = f"{name} in {listing.url}"
    if sample.image is None:
        listing.left_out.append(("caption without an image, left out", example))
        return
    try:
        caption = _caption(sample)
    except ValueError:
        listing.left_out.append(("caption that is not UTF-8 or not json, left out", example))
        return
    if not caption:
        listing.left_out.append(("sample without a caption, left out", example))
        return
    key = _NOT_IN_KEYS.sub("_", name)[:_MAX_KEY].encode()
    if key in taken:
        key = b"%b-%d" % (key, len(listing.keys))
    taken.add(key)
    listing.keys.append(key)
    listing.images.append(sample.image)
    listing.captions.append(caption)


def _caption(sample: _Sample) -> str:
    if sample.text is not None:
        return sample.text.decode().strip()
    tree = json.loads(sample.tree) if sample.tree is not None else None
    caption = tree.get("caption") if isinstance(tree, dict) else None
    return caption.strip() if isinstance(caption, str) else ""
