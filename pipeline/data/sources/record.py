"""What a source lists before any image is read, and the reading of one image."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import decode_image, image_extension, orientation_of
from pipeline.data.sample import Sample
from pipeline.data.storage.files import read_bytes, read_range
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import DataError

MAX_EXAMPLES = 5
MAX_IMAGE_BYTES = 1 << 29
"""As many as the most pixels that are decoded can have, in 16 bits and four channels."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its annotation, small and picklable.

    `path` is a path or fsspec URL; `boxes` is (N, 4) float32 xyxy, in pixels or, with
    `relative_boxes`, in fractions of the image; None for boxes over the whole image, whose size is
    not known before it is read, one for each of the `category_ids`, (N,) int64. `declared_size` is
    (width, height) as the annotation states it; `num_bytes` is the size of the image file as
    storage lists it, None where it is absent. With an `offset`, the image is that many bytes of
    `path` from there on: a member of an archive.
    """

    key: str
    path: str
    image_id: int
    boxes: NDArray[np.float32] | None
    category_ids: NDArray[np.int64]
    negative_category_ids: tuple[int, ...] = ()
    not_exhaustive_category_ids: tuple[int, ...] = ()
    coarse: bool = False
    caption: str | None = None
    declared_size: tuple[int, int] | None = None
    num_bytes: int | None = None
    offset: int | None = None
    relative_boxes: bool = False


@dataclass(frozen=True, eq=False)
class Groups:
    """Boxes around groups: no boxes of records, and neither right nor wrong in an evaluation.

    `image_ids` and `category_ids` are (N,) int64, `boxes` (N, 4) float32 xyxy, in fractions of the
    image.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float32]


@dataclass
class RecordSet:
    """All records of a source, and what was left out or altered: reason to count and to examples.

    At most `MAX_EXAMPLES` examples are kept for each reason. `groups` are those of OpenImages that
    were left out.
    """

    vocabulary: Vocabulary
    records: Sequence[Record]
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    groups: Groups | None = None

    def drop(self, reason: str, example: str) -> None:
        """Count one thing that is left out or altered."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(example)


def read_record(record: Record) -> Sample:
    """Read and decode the image of a record, and keep its bytes.

    Raises `DataError` when the image is absent, unreadable, or not of the size that its annotation
    states; `StorageError` when storage fails in another way.
    """
    try:
        image = _read_image(record)
    except FileNotFoundError:
        raise DataError(f"{record.path}: the image does not exist") from None
    try:
        width, height = decode_image(image).size
        extension = image_extension(image)
        orientation = orientation_of(image)
    except DataError as error:
        raise DataError(f"{record.path}: {error}") from None
    boxes = record.boxes
    if boxes is None:
        boxes = np.array([[0, 0, width, height]] * len(record.category_ids), dtype=np.float32)
    elif record.relative_boxes:
        boxes = boxes * np.array([width, height, width, height], dtype=np.float32)
    if record.declared_size not in (None, (width, height)):
        if record.declared_size != (height, width) or orientation < 5:
            assert record.declared_size is not None
            declared = "x".join(str(side) for side in record.declared_size)
            raise DataError(
                f"{record.path}: the image is {width}x{height} pixels, its annotation says "
                f"{declared}; boxes of another size cannot be placed"
            )
        boxes = _turn_boxes(boxes, orientation, width, height)
    return Sample(
        key=record.key,
        image=image,
        extension=extension,
        image_id=record.image_id,
        width=width,
        height=height,
        boxes=boxes,
        category_ids=record.category_ids,
        negative_category_ids=record.negative_category_ids,
        not_exhaustive_category_ids=record.not_exhaustive_category_ids,
        coarse=record.coarse,
        caption=record.caption,
    )


def _read_image(record: Record) -> bytes:
    if record.num_bytes is not None and record.num_bytes > MAX_IMAGE_BYTES:
        raise DataError(
            f"{record.path}: an image file of {record.num_bytes} bytes, more than "
            f"{MAX_IMAGE_BYTES}, is not read; scale the image down"
        )
    if record.offset is None:
        return read_bytes(record.path)
    assert record.num_bytes is not None, "a member of an archive has a size"
    return read_range(record.path, record.offset, record.offset + record.num_bytes)


def _turn_boxes(
    boxes: NDArray[np.float32], orientation: int, width: int, height: int
) -> NDArray[np.float32]:
    """Boxes drawn on the stored pixels, as they lie on the image turned by EXIF.

    `boxes` is (N, 4) xyxy; `width` and `height` are of the turned image; `orientation` is 5 to 8,
    where stored rows became columns.
    """
    x0, y0, x1, y1 = boxes.T
    left, right = (y0, y1) if orientation in (5, 8) else (width - y1, width - y0)
    top, bottom = (x0, x1) if orientation in (5, 6) else (height - x1, height - x0)
    return np.stack([left, top, right, bottom], axis=1).astype(np.float32)
