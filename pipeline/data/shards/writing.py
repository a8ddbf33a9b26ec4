"""Writing one shard: its images and their json in one tar, and beside it what it holds.

<shards>/<source>/000000.tar     <key>.jpg and <key>.json of each sample, side by side
<shards>/<source>/000000.json    what the shard holds and the digest of what it is made from
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sample import Sample
from pipeline.data.shards.index import BOX_COLUMN, SAMPLE_COLUMNS, ShardFile
from pipeline.data.shards.index_arrays import smallest
from pipeline.data.shards.sample_json import sample_to_json
from pipeline.data.shards.smaller import scale_down
from pipeline.data.sources import Record, read_record
from pipeline.data.storage.files import publish, publish_bytes, read_bytes
from pipeline.errors import DataError


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What one call of `write_shard` has to do."""

    url: str
    records: Sequence[Record]
    inputs_digest: str
    short_side: int | None = None
    """Images with a larger short side are scaled down to it."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One finished shard; `unreadable` are (key, reason) of the images that it lacks."""

    shard: ShardFile
    inputs_digest: str
    columns: dict[str, NDArray[np.integer]]
    unreadable: tuple[tuple[str, str], ...]
    scaled: dict[str, int] = field(default_factory=dict)
    """Of images that are stored smaller: `images`, `bytes_before`, `bytes_after`."""


def write_shard(task: ShardTask) -> ShardInfo:
    """Read the images of some records and write them as one tar and its sidecar.

    Unreadable images are left out and listed. The bytes depend on the records alone: no time, no
    user. Raises `StorageError` when storage fails.
    """
    # Here and not above: webdataset imports torch, which listing and reading shards do without.
    from webdataset.writer import TarWriter

    unreadable: list[tuple[str, str]] = []
    samples: dict[str, tuple[Sample, int]] = {}
    scaled = {"images": 0, "bytes_before": 0, "bytes_after": 0}
    with publish(task.url) as file:
        stream = _HashingStream(file)
        with TarWriter(
            stream, user="longtail", group="longtail", mtime=0, encoder=False, compress=False
        ) as writer:
            for record in task.records:
                try:
                    sample = read_record(record)
                except DataError as error:
                    unreadable.append((record.key, str(error)))
                    continue
                if task.short_side is not None:
                    before = len(sample.image)
                    smaller = scale_down(sample, task.short_side)
                    if smaller is not sample:
                        sample = smaller
                        scaled["images"] += 1
                        scaled["bytes_before"] += before
                        scaled["bytes_after"] += len(sample.image)
                annotation = sample_to_json(sample)
                writer.write(
                    {"__key__": sample.key, sample.extension: sample.image, "json": annotation}
                )
                checksum = zlib.crc32(annotation, zlib.crc32(sample.image))
                samples[sample.key] = (replace(sample, image=b""), checksum)
        columns = _columns(file, samples)
    shard = ShardFile(
        task.url.rsplit("/", 1)[-1], stream.num_bytes, stream.digest.hexdigest(), len(samples)
    )
    info = ShardInfo(shard, task.inputs_digest, columns, tuple(unreadable), scaled)
    publish_bytes(sidecar_url(task.url), _info_to_json(info))
    return info


def finished_shard(url: str, inputs_digest: str, present: dict[str, int]) -> ShardInfo | None:
    """What the shard at `url` holds, if it is whole and made from what the digest stands for.

    `present` are the files of its directory with their sizes.
    """
    sidecar = sidecar_url(url)
    if sidecar.rsplit("/", 1)[-1] not in present:
        return None
    try:
        info = _info_from_json(read_bytes(sidecar))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        # Damaged or of an older form: the shard is written again.
        return None
    whole = present.get(info.shard.file) == info.shard.num_bytes
    return info if whole and info.inputs_digest == inputs_digest else None


def _columns(
    file: BinaryIO, samples: dict[str, tuple[Sample, int]]
) -> dict[str, NDArray[np.integer]]:
    """The columns of the index, with the offsets that the finished tar itself has."""
    places: dict[str, tuple[int, int]] = {}
    file.flush()
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            places[member.name] = (member.offset_data, member.size)
    rows = []
    for key, (sample, checksum) in samples.items():
        image, annotation = places[f"{key}.{sample.extension}"], places[f"{key}.json"]
        size = (sample.width, sample.height)
        rows.append((*image, *annotation, checksum, *size, sample.image_id, len(sample.boxes)))
    table = np.array(rows, dtype=np.int64).reshape(-1, len(SAMPLE_COLUMNS))
    columns: dict[str, NDArray[np.integer]] = {
        column: smallest(table[:, k]) for k, column in enumerate(SAMPLE_COLUMNS)
    }
    category_ids = [sample.category_ids for sample, _ in samples.values()]
    columns[BOX_COLUMN] = smallest(np.concatenate([np.zeros(0, dtype=np.int64), *category_ids]))
    return columns


def _info_to_json(info: ShardInfo) -> bytes:
    tree = {
        "shard": asdict(info.shard),
        "inputs_digest": info.inputs_digest,
        "columns": {name: column.tolist() for name, column in info.columns.items()},
        "unreadable": info.unreadable,
        "scaled": info.scaled,
    }
    return json.dumps(tree, separators=(",", ":")).encode()


def _info_from_json(data: bytes) -> ShardInfo:
    tree = json.loads(data)
    return ShardInfo(
        ShardFile(**tree["shard"]),
        tree["inputs_digest"],
        {
            name: smallest(np.array(tree["columns"][name], dtype=np.int64))
            for name in (*SAMPLE_COLUMNS, BOX_COLUMN)
        },
        tuple((key, reason) for key, reason in tree["unreadable"]),
        tree["scaled"],
    )


def sidecar_url(url: str) -> str:
    """Where the sidecar of a shard is."""
    return url.removesuffix(".tar") + ".json"


class _HashingStream:
    """What a tar writer writes to: counts and hashes on the way to the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self._file = file

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)
