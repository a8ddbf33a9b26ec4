"""The index of a source's shards: what every sample is, where it lies, and reading any one.

<shards>/<source>/index.json    shards with sizes and sha256, vocabulary, counts, the report
<shards>/<source>/index.bin     a row for each sample, in columns (`index_arrays.py`)
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sample import Sample
from pipeline.data.shards.index_arrays import (
    MAX_SAMPLE_BYTES,
    ColumnPlace,
    category_counts,
    check_columns,
    damaged,
    map_columns,
    view_columns,
    write_columns,
)
from pipeline.data.shards.sample_json import sample_from_json
from pipeline.data.storage.files import (
    list_directory,
    publish,
    publish_bytes,
    read_bytes,
    read_range,
    scheme_of,
)
from pipeline.data.storage.local_copy import is_remembered, local_copy, remember
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import StorageError

FORMAT_VERSION = 2
"""Of the index. A newer one is made from the same shards by `longtail prepare`."""
SHARD_VERSION = 1
"""Of what is in the tars: the digest of an index, which checkpoints keep, depends on it."""
HEADER_FILE = "index.json"
ARRAYS_FILE = "index.bin"

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
"""What a finished shard tells of each sample; `crc32` runs over the image and then the json."""
BOX_COLUMN = "category_ids"
"""One integer for each box, sample after sample."""
_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One tar file of a source, by its name in the source's directory."""

    file: str
    num_bytes: int
    sha256: str
    count: int


class Index:
    """All samples of one prepared source, in shard order.

    The columns are mapped when first asked for, from the file itself or from a copy on this machine
    (`local_copy.py`), and do not travel with a pickle: an index goes to reader processes for the
    price of its header, and its columns are in memory once.
    """

    def __init__(self, url: str, header: Mapping[str, object]) -> None:
        tree: dict = dict(header)
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
        self._image_counts: dict[str, int] = tree["image_counts"]
        self._arrays_bytes: int = tree["arrays"]["num_bytes"]
        self._arrays_sha256: str = tree["arrays"]["sha256"]
        columns: dict[str, dict] = tree["arrays"]["columns"]
        self._places = {name: ColumnPlace(**place) for name, place in columns.items()}

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, object]:
        cached = [name for name, value in vars(type(self)).items() if _is_cached(value)]
        return {name: value for name, value in vars(self).items() if name not in cached}

    @property
    def shard(self) -> NDArray[np.int32]:
        """(N,) position in `shards` of each sample's shard, never decreasing."""
        return self._arrays["shard"]

    @property
    def width(self) -> NDArray[np.int32]:
        """(N,) width of each image in pixels, as people see it."""
        return self._arrays["width"]

    @property
    def height(self) -> NDArray[np.int32]:
        """(N,) height of each image in pixels, as people see it."""
        return self._arrays["height"]

    @property
    def image_id(self) -> NDArray[np.int64]:
        """(N,) image id that the source gives."""
        return self._arrays["image_id"]

    @property
    def category_offsets(self) -> NDArray[np.int64]:
        """(N + 1,): the boxes of sample i are `category_offsets[i] : category_offsets[i + 1]`."""
        return self._arrays["category_offsets"]

    @property
    def category_ids(self) -> NDArray[np.int32]:
        """(boxes,) category id of every box of every sample, `UNLABELLED` where none is given."""
        return self._arrays[BOX_COLUMN]

    @property
    def num_boxes(self) -> int:
        """Boxes of all samples; from the header, as everything that is no column."""
        return self._places[BOX_COLUMN].length

    def image_counts(self) -> dict[int, int]:
        """In how many images each category of the vocabulary has a box, by category id."""
        return {number: self._image_counts[str(number)] for number in self.vocabulary.ids}

    def shard_url(self, position: int) -> str:
        """Where a shard is."""
        return f"{self.url}/{self.shards[position].file}"

    def span(self, i: int) -> tuple[int, int, int]:
        """Where sample `i` lies: position of its shard, first byte, and byte after the last."""
        assert 0 <= i < self.num_samples, f"sample {i} of {self.num_samples}"
        start, _, stop = self._edges(i)
        return int(self.shard[i]), start, stop

    def parse(self, i: int, data: bytes) -> Sample:
        """Sample `i` of the bytes of its `span`; raises `StorageError` when they are others."""
        start, (image_offset, image_size, json_offset, json_size), stop = self._edges(i)
        image = data[image_offset - start : image_offset - start + image_size]
        annotation = data[json_offset - start : json_offset - start + json_size]
        if zlib.crc32(annotation, zlib.crc32(image)) != int(self._arrays["crc32"][i]):
            url = self.shard_url(int(self.shard[i]))
            raise StorageError(
                f"{url}: sample {i} (bytes {start} to {stop}) is not what was written; the shard "
                "is damaged or was replaced: delete it and run `longtail prepare` again"
            )
        return sample_from_json(image, json.loads(annotation))

    def read(self, i: int) -> Sample:
        """Sample i by one ranged read; raises `StorageError` naming a missing or damaged shard."""
        shard, start, stop = self.span(i)
        url = self.shard_url(shard)
        try:
            data = read_range(url, start, stop)
        except FileNotFoundError:
            raise StorageError(f"{url} is missing; run `longtail prepare` again") from None
        return self.parse(i, data)

    def verify(self) -> None:
        """Read every shard whole; raises `StorageError` naming all that are not as written."""
        # A web server's listing has no sizes, if there is one.
        on_the_web = scheme_of(self.url) in ("http", "https")
        present = {} if on_the_web else list_directory(self.url)[0]
        bad = []
        for shard in self.shards:
            size = present.get(shard.file, shard.num_bytes)
            try:
                if size != shard.num_bytes:
                    bad.append(f"{shard.file} has {size} bytes instead of {shard.num_bytes}")
                elif self._sha256_of(shard) != shard.sha256:
                    bad.append(f"{shard.file} has another sha256")
            except FileNotFoundError:
                bad.append(f"{shard.file} is missing")
        if bad:
            raise StorageError(
                f"{self.url}: {len(bad)} of {len(self.shards)} shards are damaged "
                f"({'; '.join(bad[:5])}); delete them and run `longtail prepare` again"
            )

    def _sha256_of(self, shard: ShardFile) -> str:
        digest, url = hashlib.sha256(), f"{self.url}/{shard.file}"
        for start in range(0, shard.num_bytes, _BLOCK):
            digest.update(read_range(url, start, min(start + _BLOCK, shard.num_bytes)))
        return digest.hexdigest()

    @cached_property
    def _arrays(self) -> dict[str, NDArray]:
        url = f"{self.url}/{ARRAYS_FILE}"
        shards = [(shard.count, shard.num_bytes) for shard in self.shards]
        try:
            if scheme_of(url) == "memory":
                # It belongs to this process alone.
                data = read_bytes(url)
                if hashlib.sha256(data).hexdigest() != self._arrays_sha256:
                    raise damaged(url, "another sha256")
                columns = view_columns(data, self._places)
                check_columns(columns, shards, self.vocabulary.ids)
                return columns
            path = local_copy(url, self._arrays_bytes, self._arrays_sha256)
            columns = map_columns(path, self._places)
            if not is_remembered(path):
                check_columns(columns, shards, self.vocabulary.ids)
                remember(path)
            return columns
        except FileNotFoundError:
            raise StorageError(f"{url} is missing; run `longtail prepare` again") from None
        except (ValueError, KeyError) as error:
            if isinstance(error, StorageError):
                raise
            raise damaged(url, error) from None

    def _edges(self, i: int) -> tuple[int, tuple[int, int, int, int], int]:
        columns = self._arrays
        image_offset, image_size = int(columns["image_offset"][i]), int(columns["image_size"][i])
        json_offset, json_size = int(columns["json_offset"][i]), int(columns["json_size"][i])
        start = min(image_offset, json_offset)
        stop = max(image_offset + image_size, json_offset + json_size)
        if stop - start > MAX_SAMPLE_BYTES:
            raise damaged(f"{self.url}/{ARRAYS_FILE}", f"sample {i} has {stop - start} bytes")
        return start, (image_offset, image_size, json_offset, json_size), stop


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
        found = header.get("format") if isinstance(header, dict) else None
        raise StorageError(
            f"{header_url} is an index of format {found}, and this version of longtail reads "
            f"format {FORMAT_VERSION}; run `longtail prepare` again"
        )
    try:
        index = Index(url, header)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(header_url, f"{type(error).__name__}: {error}") from None
    for shard in index.shards:
        numbers = (shard.count, shard.num_bytes)
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or "/" in str(shard.file):
            raise damaged(header_url, f"shard {shard}")
    if index.num_samples != sum(shard.count for shard in index.shards):
        raise damaged(header_url, f"its shards do not hold {index.num_samples} samples")
    return index


def write_index(
    url: str,
    name: str,
    vocabulary: Vocabulary,
    shards: Sequence[tuple[ShardFile, Mapping[str, NDArray[np.integer]]]],
    *,
    inputs_digest: str,
    report: Mapping[str, object],
) -> Index:
    """Write index.bin, then index.json, which makes the source a prepared one."""
    boxes = _joined(shards, BOX_COLUMN)
    offsets = np.concatenate([[0], np.cumsum(_joined(shards, "num_boxes"))])
    with publish(f"{url}/{ARRAYS_FILE}") as file:
        places, num_bytes, sha256 = write_columns(file, _columns_of(shards, boxes, offsets))
    files = [asdict(shard) for shard, _ in shards]
    content = json.dumps([SHARD_VERSION, vocabulary.digest, files])
    header: dict[str, object] = {
        "format": FORMAT_VERSION,
        "name": name,
        "digest": hashlib.sha256(content.encode()).hexdigest()[:16],
        "inputs_digest": inputs_digest,
        "num_samples": sum(shard.count for shard, _ in shards),
        "arrays": {
            "num_bytes": num_bytes,
            "sha256": sha256,
            "columns": {column: asdict(place) for column, place in places.items()},
        },
        "image_counts": category_counts(boxes, offsets, vocabulary.ids),
        "report": dict(report),
        "shards": files,
        "vocabulary": vocabulary.to_json(),
    }
    text = json.dumps(header)
    publish_bytes(f"{url}/{HEADER_FILE}", text.encode())
    return Index(url, json.loads(text))


def _columns_of(
    shards: Sequence[tuple[ShardFile, Mapping[str, NDArray[np.integer]]]],
    boxes: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> Iterator[tuple[str, NDArray[np.integer]]]:
    """The columns of the file, one at a time, for all of them at once may be gigabytes."""
    counts = [shard.count for shard, _ in shards]
    yield "shard", np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    for column in SAMPLE_COLUMNS[:-1]:
        yield column, _joined(shards, column)
    yield "category_offsets", offsets
    yield BOX_COLUMN, boxes


def _joined(
    shards: Sequence[tuple[ShardFile, Mapping[str, NDArray[np.integer]]]], column: str
) -> NDArray[np.int64]:
    parts = [np.zeros(0, dtype=np.int64), *(columns[column] for _, columns in shards)]
    return np.concatenate(parts, dtype=np.int64)


def _is_cached(value: object) -> bool:
    return isinstance(value, cached_property)
