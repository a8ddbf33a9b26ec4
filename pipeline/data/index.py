"""The index of a source's shards: what every sample is, where it lies, and reading any one."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sample import Sample
from pipeline.data.storage import (
    open_filesystem,
    publish_bytes,
    read_bytes,
    storage_errors,
)
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import StorageError

FORMAT_VERSION = 1
HEADER_FILE = "index.json"
ARRAYS_FILE = "index.npz"

SAMPLE_COLUMNS = (
    "image_offset",
    "image_size",
    "json_offset",
    "json_size",
    "crc32",
    "width",
    "height",
    "image_id",
    "num_boxes",
)
"""One integer for each sample; `crc32` runs over the image and then the json."""
BOX_COLUMN = "category_ids"
"""One integer for each box, sample after sample."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One tar file of a source, by its name in the source's directory."""

    file: str
    num_bytes: int
    sha256: str
    count: int


class Index:
    """All samples of one prepared source, in shard order.

    The arrays are read from storage when first asked for and do not travel with a pickle, so an
    index goes to reader processes for the price of its header.
    """

    def __init__(self, url: str, header: Mapping[str, object]) -> None:
        tree = json.loads(json.dumps(header))
        self.url = url
        self.name: str = tree["name"]
        self.digest: str = tree["digest"]
        """Of the samples and the vocabulary: equal data gives an equal digest anywhere."""
        self.inputs_digest: str = tree["inputs_digest"]
        """Of the records and settings that the shards were made from."""
        self.num_samples: int = tree["num_samples"]
        self.vocabulary = Vocabulary.from_json(tree["vocabulary"])
        self.shards = tuple(ShardFile(**shard) for shard in tree["shards"])
        self.report: dict[str, object] = tree["report"]
        """`dropped` (reason: count), `examples` (reason: texts), `unreadable` ([key, reason])."""
        self._arrays_sha256: str = tree["arrays_sha256"]

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, object]:
        cached = [name for name, value in vars(type(self)).items() if _is_cached(value)]
        return {name: value for name, value in vars(self).items() if name not in cached}

    @cached_property
    def shard(self) -> NDArray[np.int32]:
        """(N,) position in `shards` of each sample's shard, never decreasing."""
        counts = [shard.count for shard in self.shards]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @cached_property
    def width(self) -> NDArray[np.int32]:
        """(N,) width of each image in pixels, as people see it."""
        return self._arrays["width"].astype(np.int32)

    @cached_property
    def height(self) -> NDArray[np.int32]:
        """(N,) height of each image in pixels, as people see it."""
        return self._arrays["height"].astype(np.int32)

    @cached_property
    def image_id(self) -> NDArray[np.int64]:
        """(N,) image id that the source gives."""
        return self._arrays["image_id"].astype(np.int64)

    @cached_property
    def category_offsets(self) -> NDArray[np.int64]:
        """(N + 1,): the boxes of sample i are `category_offsets[i] : category_offsets[i + 1]`."""
        counts = self._arrays["num_boxes"]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def category_ids(self) -> NDArray[np.int32]:
        """(boxes,) category id of every box of every sample, `UNLABELLED` where none is given."""
        return self._arrays[BOX_COLUMN].astype(np.int32)

    def image_counts(self) -> dict[int, int]:
        """In how many images each category of the vocabulary has a box, by category id."""
        samples = np.repeat(np.arange(self.num_samples), np.diff(self.category_offsets))
        labelled = self.category_ids >= 0
        span = int(self.category_ids.max(initial=0)) + 1
        pairs = np.unique(samples[labelled] * span + self.category_ids[labelled])
        counts = np.bincount(pairs % span, minlength=span)
        return {
            number: int(counts[number]) if number < span else 0 for number in self.vocabulary.ids
        }

    def shard_url(self, position: int) -> str:
        """Where a shard is."""
        return f"{self.url}/{self.shards[position].file}"

    def read(self, i: int) -> Sample:
        """Sample i by one ranged read; raises `StorageError` naming a missing or damaged shard."""
        assert 0 <= i < self.num_samples, f"sample {i} of {self.num_samples}"
        columns = self._arrays
        image_offset, image_size = int(columns["image_offset"][i]), int(columns["image_size"][i])
        json_offset, json_size = int(columns["json_offset"][i]), int(columns["json_size"][i])
        start = min(image_offset, json_offset)
        stop = max(image_offset + image_size, json_offset + json_size)
        url = self.shard_url(int(self.shard[i]))
        data = self._read_range(url, start, stop)
        image = data[image_offset - start : image_offset - start + image_size]
        annotation = data[json_offset - start : json_offset - start + json_size]
        if zlib.crc32(annotation, zlib.crc32(image)) != int(columns["crc32"][i]):
            raise StorageError(
                f"{url}: sample {i} (bytes {start} to {stop}) is not what was written; the shard "
                "is damaged or was replaced: delete it and run `longtail prepare` again"
            )
        return _sample_from_json(image, json.loads(annotation))

    def verify(self) -> None:
        """Read every shard whole; raises `StorageError` naming all that are not as written."""
        bad = []
        for shard in self.shards:
            url = f"{self.url}/{shard.file}"
            digest = hashlib.sha256()
            filesystem, path = open_filesystem(url)
            try:
                with storage_errors("read", url), filesystem.open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except FileNotFoundError:
                bad.append(f"{shard.file} is missing")
                continue
            if digest.hexdigest() != shard.sha256:
                bad.append(f"{shard.file} has another sha256")
        if bad:
            raise StorageError(
                f"{self.url}: {len(bad)} of {len(self.shards)} shards are damaged "
                f"({'; '.join(bad[:5])}); delete them and run `longtail prepare` again"
            )

    @cached_property
    def _arrays(self) -> dict[str, NDArray[np.integer]]:
        url = f"{self.url}/{ARRAYS_FILE}"
        try:
            data = read_bytes(url)
        except FileNotFoundError:
            raise StorageError(f"{url} is missing; run `longtail prepare` again") from None
        if hashlib.sha256(data).hexdigest() != self._arrays_sha256:
            raise StorageError(f"{url} is not what its index says; run `longtail prepare` again")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in (*SAMPLE_COLUMNS, BOX_COLUMN)}

    def _read_range(self, url: str, start: int, stop: int) -> bytes:
        filesystem, path = open_filesystem(url)
        try:
            with storage_errors("read", url):
                data = filesystem.cat_file(path, start=start, end=stop)
        except FileNotFoundError:
            raise StorageError(f"{url} is missing; run `longtail prepare` again") from None
        if len(data) != stop - start:
            raise StorageError(
                f"{url}: {len(data)} bytes came instead of {stop - start} (from byte {start}); "
                "the shard is cut short: delete it and run `longtail prepare` again"
            )
        return bytes(data)


def load_index(url: str) -> Index:
    """The index of the shards at `url`; raises `StorageError` when it is missing or damaged."""
    header_url = f"{url}/{HEADER_FILE}"
    try:
        header = json.loads(read_bytes(header_url))
    except FileNotFoundError:
        raise StorageError(f"no prepared shards at {url}; run `longtail prepare` first") from None
    except ValueError:
        raise StorageError(f"{header_url} is damaged; run `longtail prepare` again") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT_VERSION:
        raise StorageError(
            f"{header_url} is not an index of format {FORMAT_VERSION}; run `longtail prepare` again"
        )
    return Index(url, header)


def write_index(
    url: str,
    name: str,
    vocabulary: Vocabulary,
    shards: Sequence[tuple[ShardFile, Mapping[str, NDArray[np.int64]]]],
    *,
    inputs_digest: str,
    report: Mapping[str, object],
) -> Index:
    """Write index.npz, then index.json, which makes the source a prepared one."""
    arrays = {
        column: _compact(
            np.concatenate([columns[column] for _, columns in shards])
            if shards
            else np.zeros(0, dtype=np.int64)
        )
        for column in (*SAMPLE_COLUMNS, BOX_COLUMN)
    }
    packed = _pack(arrays)
    publish_bytes(f"{url}/{ARRAYS_FILE}", packed)
    files = [asdict(shard) for shard, _ in shards]
    content = json.dumps([FORMAT_VERSION, vocabulary.digest, files])
    header: dict[str, object] = {
        "format": FORMAT_VERSION,
        "name": name,
        "digest": hashlib.sha256(content.encode()).hexdigest()[:16],
        "inputs_digest": inputs_digest,
        "num_samples": sum(shard.count for shard, _ in shards),
        "arrays_sha256": hashlib.sha256(packed).hexdigest(),
        "report": dict(report),
        "shards": files,
        "vocabulary": vocabulary.to_json(),
    }
    publish_bytes(f"{url}/{HEADER_FILE}", json.dumps(header).encode())
    return Index(url, header)


def sample_to_json(sample: Sample) -> bytes:
    """Everything of a sample but its image."""
    tree = {
        "key": sample.key,
        "extension": sample.extension,
        "image_id": sample.image_id,
        "width": sample.width,
        "height": sample.height,
        # The shortest decimals that give the same float32 again.
        "boxes": [[float(str(side)) for side in box] for box in sample.boxes.astype(np.float32)],
        "category_ids": sample.category_ids.tolist(),
        "negative_category_ids": list(sample.negative_category_ids),
        "not_exhaustive_category_ids": list(sample.not_exhaustive_category_ids),
        "coarse": sample.coarse,
        "caption": sample.caption,
    }
    return json.dumps(tree, separators=(",", ":")).encode()


def _sample_from_json(image: bytes, tree: Mapping) -> Sample:
    return Sample(
        key=tree["key"],
        image=image,
        extension=tree["extension"],
        image_id=tree["image_id"],
        width=tree["width"],
        height=tree["height"],
        boxes=np.array(tree["boxes"], dtype=np.float32).reshape(-1, 4),
        category_ids=np.array(tree["category_ids"], dtype=np.int64),
        negative_category_ids=tuple(tree["negative_category_ids"]),
        not_exhaustive_category_ids=tuple(tree["not_exhaustive_category_ids"]),
        coarse=tree["coarse"],
        caption=tree["caption"],
    )


def _compact(values: NDArray[np.int64]) -> NDArray[np.integer]:
    """The same integers in the smallest type that holds them all."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    return values.astype(np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)))


def _pack(arrays: Mapping[str, NDArray[np.integer]]) -> bytes:
    """An .npz whose bytes depend on the arrays alone; numpy's own writer adds the time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def _is_cached(value: object) -> bool:
    return isinstance(value, cached_property)
