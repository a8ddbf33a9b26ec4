"""Samples as WebDataset tar shards: writing them once, in parallel, and never half.

    <shards>/<source>/000000.tar  ...    <key>.jpg and <key>.json of each sample, side by side
    <shards>/<source>/000000.json ...    what the shard holds and the digest of what it is made from
    <shards>/<source>/index.npz          offsets, sizes, ids and categories of every sample
    <shards>/<source>/index.json         written last: with it the source is prepared

Stock webdataset reads the shards. Our own reading goes through the index, with sizes and
checksums, because webdataset 1.0 drops the rest of a damaged shard without a word.
"""

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import (
    BOX_COLUMN,
    FORMAT_VERSION,
    HEADER_FILE,
    SAMPLE_COLUMNS,
    Index,
    ShardFile,
    load_index,
    sample_to_json,
    write_index,
)
from pipeline.data.sample import Sample
from pipeline.data.sources import Record, RecordSet, list_records, read_record
from pipeline.data.storage import (
    exists,
    list_directory,
    publish,
    publish_bytes,
    read_bytes,
    remove,
    resolve,
)
from pipeline.errors import DataError, StorageError
from pipeline.recipe import Data, Source

__all__ = [
    "Index",
    "RunTasks",
    "ShardFile",
    "ShardInfo",
    "ShardTask",
    "load_index",
    "prepare_source",
    "shards_url",
    "write_shard",
]

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class RunTasks(Protocol):
    """Calls `function(argument)` for each argument, perhaps elsewhere and in any order.

    Yields (position of the argument, result) as they finish.
    """

    def __call__(
        self, function: Callable[[Argument], Result], arguments: Sequence[Argument], /
    ) -> Iterator[tuple[int, Result]]: ...


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What one call of `write_shard` has to do."""

    url: str
    records: tuple[Record, ...]
    inputs_digest: str


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One finished shard; `unreadable` are (key, reason) of the images that it lacks."""

    shard: ShardFile
    inputs_digest: str
    columns: dict[str, NDArray[np.int64]]
    unreadable: tuple[tuple[str, str], ...]


def shards_url(data: Data, source: Source) -> str:
    """The directory, or URL, of a source's shards."""
    if data.shards is None:
        return resolve(data.root, "shards", source.name)
    return resolve(data.shards, source.name)


def prepare_source(
    source: Source,
    data: Data,
    run_tasks: RunTasks,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Write what is missing of a source's shards, and their index; quick when nothing is.

    Shards that are there and made from the same records are kept, so an interrupted call goes on.
    `progress` gets (records done, records in all). One call at a time may prepare a directory.
    Raises `DataError` when more than `data.bad_sample_budget` images are unreadable; then there
    is no index.
    """
    url = shards_url(data, source)
    if not exists(resolve(data.root, source.annotations or source.images)):
        # Shards travel without the raw data that they were made from.
        index = _whole_index(url, list_directory(url)[0])
        if index is not None:
            return index
    record_set = list_records(source, data.root)
    tasks = _plan_tasks(url, record_set, data.samples_per_shard)
    digests = [FORMAT_VERSION, record_set.vocabulary.to_json(), [t.inputs_digest for t in tasks]]
    inputs_digest = _sha256(json.dumps([source.name, source.format, *digests]))
    present, _ = list_directory(url)
    index = _prepared_index(url, inputs_digest, present)
    if index is not None:
        if len(_unreadable_of(index)) > data.bad_sample_budget:
            raise _over_budget(source, data, _unreadable_of(index), len(record_set.records))
        return index
    absent = [(r.key, f"{r.path}: absent") for r in record_set.records if r.num_bytes is None]
    if len(absent) > data.bad_sample_budget:
        raise _over_budget(source, data, absent, len(record_set.records))
    for name in present:
        if name == HEADER_FILE or name.endswith(".tmp"):
            # The old index must not outlive the first shard that is written over.
            remove(f"{url}/{name}")
    infos = _write_missing(source, data, tasks, present, run_tasks, progress)
    unreadable = [entry for info in infos for entry in info.unreadable]
    index = write_index(
        url,
        source.name,
        record_set.vocabulary,
        [(info.shard, info.columns) for info in infos if info.shard.count],
        inputs_digest=inputs_digest,
        report={
            "dropped": record_set.dropped,
            "examples": record_set.examples,
            "unreadable": unreadable,
        },
    )
    kept = {shard.file for shard in index.shards} | {_sidecar(task.url) for task in tasks}
    for name in present:
        if re.fullmatch(r"\d{6}\.(tar|json)", name) and not {name, f"{url}/{name}"} & kept:
            remove(f"{url}/{name}")
    return index


def write_shard(task: ShardTask) -> ShardInfo:
    """Read the images of some records and write them as one tar and its sidecar.

    Unreadable images are left out and listed. The bytes depend on the records alone: no time, no
    user. Raises `StorageError` when storage fails.
    """
    # Here and not above: webdataset imports torch, which listing and reading shards do without.
    from webdataset.writer import TarWriter

    unreadable: list[tuple[str, str]] = []
    samples: dict[str, tuple[Sample, int]] = {}
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
    info = ShardInfo(shard, task.inputs_digest, columns, tuple(unreadable))
    publish_bytes(_sidecar(task.url), _info_to_json(info))
    return info


def _plan_tasks(url: str, record_set: RecordSet, samples_per_shard: int) -> list[ShardTask]:
    # Sources list by id or by class; in the order of a hash, any run of shards is a fair draw.
    records = sorted(
        record_set.records, key=lambda record: hashlib.blake2b(record.key.encode()).digest()
    )
    tasks = []
    for start in range(0, len(records), samples_per_shard):
        chunk = tuple(records[start : start + samples_per_shard])
        file = f"{start // samples_per_shard:06d}.tar"
        tasks.append(ShardTask(f"{url}/{file}", chunk, _records_digest(chunk)))
    return tasks


def _records_digest(records: Sequence[Record]) -> str:
    """Of all that a shard depends on; file sizes stand for the images, folders do not count."""
    digest = hashlib.sha256(str(FORMAT_VERSION).encode())
    for record in records:
        plain = [
            record.key,
            record.path.rsplit("/", 1)[-1],
            record.num_bytes,
            record.image_id,
            record.declared_size,
            record.negative_category_ids,
            record.not_exhaustive_category_ids,
            record.coarse,
            record.caption,
            None if record.boxes is None else len(record.boxes),
        ]
        digest.update(json.dumps(plain).encode())
        digest.update(record.category_ids.tobytes())
        if record.boxes is not None:
            digest.update(record.boxes.tobytes())
    return digest.hexdigest()


def _prepared_index(url: str, inputs_digest: str, present: dict[str, int]) -> Index | None:
    """The index that is there, if it is of these inputs and its shards are there in full size."""
    index = _whole_index(url, present)
    return index if index is not None and index.inputs_digest == inputs_digest else None


def _whole_index(url: str, present: dict[str, int]) -> Index | None:
    """The index that is there, if its shards are there in full size."""
    if HEADER_FILE not in present:
        return None
    try:
        index = load_index(url)
    except StorageError:
        return None
    whole = all(present.get(shard.file) == shard.num_bytes for shard in index.shards)
    return index if whole else None


def _write_missing(
    source: Source,
    data: Data,
    tasks: Sequence[ShardTask],
    present: dict[str, int],
    run_tasks: RunTasks,
    progress: Callable[[int, int], None] | None,
) -> list[ShardInfo]:
    """What every task gives, in their order; those whose shard is finished are not run."""
    infos = [_finished_shard(task, present) for task in tasks]
    missing = [i for i, info in enumerate(infos) if info is None]
    total = sum(len(task.records) for task in tasks)
    done = total - sum(len(tasks[i].records) for i in missing)
    unreadable = [entry for info in infos if info for entry in info.unreadable]
    if progress:
        progress(done, total)
    for position, info in run_tasks(write_shard, [tasks[i] for i in missing]):
        infos[missing[position]] = info
        unreadable.extend(info.unreadable)
        if len(unreadable) > data.bad_sample_budget:
            raise _over_budget(source, data, unreadable, total)
        done += len(tasks[missing[position]].records)
        if progress:
            progress(done, total)
    finished = [info for info in infos if info is not None]
    assert len(finished) == len(tasks), "run_tasks left out a task"
    if len(unreadable) > data.bad_sample_budget:
        raise _over_budget(source, data, unreadable, total)
    return finished


def _finished_shard(task: ShardTask, present: dict[str, int]) -> ShardInfo | None:
    sidecar = _sidecar(task.url)
    if sidecar.rsplit("/", 1)[-1] not in present:
        return None
    try:
        info = _info_from_json(read_bytes(sidecar))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        # Damaged or of an older form: the shard is written again.
        return None
    whole = present.get(info.shard.file) == info.shard.num_bytes
    return info if whole and info.inputs_digest == task.inputs_digest else None


def _over_budget(
    source: Source, data: Data, unreadable: Sequence[tuple[str, str]], total: int
) -> DataError:
    shown = "; ".join(reason for _, reason in unreadable[:5])
    return DataError(
        f"source {source.name}: {len(unreadable)} of {total} images cannot be read, and "
        f"data.bad_sample_budget allows {data.bad_sample_budget} ({shown}); mend the files, or "
        "raise the budget"
    )


def _unreadable_of(index: Index) -> list[tuple[str, str]]:
    entries = index.report["unreadable"]
    assert isinstance(entries, list)
    return [(key, reason) for key, reason in entries]


def _columns(
    file: BinaryIO, samples: dict[str, tuple[Sample, int]]
) -> dict[str, NDArray[np.int64]]:
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
    columns = {column: table[:, k] for k, column in enumerate(SAMPLE_COLUMNS)}
    category_ids = [sample.category_ids for sample, _ in samples.values()]
    columns[BOX_COLUMN] = np.concatenate([np.zeros(0, dtype=np.int64), *category_ids])
    return columns


def _info_to_json(info: ShardInfo) -> bytes:
    tree = {
        "shard": asdict(info.shard),
        "inputs_digest": info.inputs_digest,
        "columns": {name: column.tolist() for name, column in info.columns.items()},
        "unreadable": info.unreadable,
    }
    return json.dumps(tree, separators=(",", ":")).encode()


def _info_from_json(data: bytes) -> ShardInfo:
    tree = json.loads(data)
    return ShardInfo(
        ShardFile(**tree["shard"]),
        tree["inputs_digest"],
        {
            name: np.array(tree["columns"][name], dtype=np.int64)
            for name in (*SAMPLE_COLUMNS, BOX_COLUMN)
        },
        tuple((key, reason) for key, reason in tree["unreadable"]),
    )


def _sidecar(url: str) -> str:
    return url.removesuffix(".tar") + ".json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
