"""The shards of a source: planning them, writing what is missing, and then their index.

    <shards>/<source>/000000.tar  ...    <key>.jpg and <key>.json of each sample, side by side
    <shards>/<source>/000000.json ...    what the shard holds and the digest of what it is made from
    <shards>/<source>/index.bin          offsets, sizes, ids and categories of every sample
    <shards>/<source>/index.json         written last: with it the source is prepared
    <shards>/<source>/ground_truth.json  of a validation source of some formats

Stock webdataset reads the shards. Our own reading goes through the index, with sizes and
checksums, because webdataset 1.0 drops the rest of a damaged shard without a word.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from pipeline.data.shards.ground_truth import load_ground_truth, write_ground_truth
from pipeline.data.shards.index import (
    FORMAT_VERSION,
    HEADER_FILE,
    Index,
    ShardFile,
    load_index,
    write_index,
)
from pipeline.data.shards.tasks import MissingShards, ShardPlan
from pipeline.data.shards.writing import (
    ShardInfo,
    ShardTask,
    finished_shard,
    sidecar_url,
    write_shard,
)
from pipeline.data.sources import RecordSet, list_records
from pipeline.data.sources.columns import RecordColumns
from pipeline.data.storage.files import (
    exists,
    list_directory,
    refuse_to_write,
    remove,
    resolve,
    scheme_of,
)
from pipeline.data.storage.lock import sole_writer
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import DataError, StorageError
from pipeline.recipe import Source
from pipeline.recipe.data import WRITTEN_TRUTH, Shards

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
Progress = Callable[[int, int, str], None]
"""Told the records done, those in all, and the rate of writing."""

_LISTERS = 16
"""Sidecars that are read at a time: each waits for storage."""


class RunTasks(Protocol):
    """Calls `function(argument)` for each argument, perhaps elsewhere and in any order.

    Yields (position of the argument, result) as they finish. Arguments may be made when they are
    asked for, so each is to be asked for once, and late.
    """

    def __call__(
        self, function: Callable[[Argument], Result], arguments: Sequence[Argument], /
    ) -> Iterator[tuple[int, Result]]: ...


def shards_url(data: Shards, source: Source) -> str:
    """The directory, or URL, of a source's shards."""
    if data.shards is None:
        return resolve(data.root, "shards", source.name)
    return resolve(data.shards, source.name)


def prepare_source(
    source: Source,
    data: Shards,
    run_tasks: RunTasks,
    progress: Progress | None = None,
    *,
    short_side: int | None = None,
    evaluated: bool = False,
    vocabulary: Vocabulary | None = None,
) -> Index:
    """Write what is missing of a source's shards, and their index; quick when nothing is.

    Shards that are there and made from the same records are kept, so an interrupted call goes on.
    With `short_side`, larger images are stored scaled down to it. Of a source that is `evaluated`
    the ground truth is written too, where its format is in `WRITTEN_TRUTH`; `vocabulary` is for
    `list_records`. Raises `DataError` when more than `data.bad_sample_budget` images are
    unreadable; then there is no index. Raises `StorageError` while another process prepares the
    same local directory.
    """
    writes_truth = evaluated and source.format in WRITTEN_TRUTH
    url = shards_url(data, source)
    if scheme_of(url) in ("http", "https") or not exists(
        resolve(data.root, source.annotations or source.images)
    ):
        # Shards travel without the raw data that they were made from.
        index = _whole_index(url, list_directory(url)[0])
        if index is not None:
            if writes_truth:
                load_ground_truth(index)  # What lacks it is refused before any training.
            return index
        refuse_to_write(url)
    record_set = list_records(source, data.root, vocabulary)
    index = _prepare_records(source, data, record_set, run_tasks, progress, short_side)
    if writes_truth:
        write_ground_truth(index, record_set)
    return index


def _prepare_records(
    source: Source,
    data: Shards,
    record_set: RecordSet,
    run_tasks: RunTasks,
    progress: Progress | None,
    short_side: int | None,
) -> Index:
    """The index of a source's records, after what is missing of it was written."""
    url = shards_url(data, source)
    plan = ShardPlan(url, record_set.records, data.samples_per_shard, short_side)
    digests = [FORMAT_VERSION, record_set.vocabulary.to_json(), plan.digests]
    inputs_digest = _sha256(json.dumps([source.name, source.format, *digests]))
    index = _prepared_index(url, inputs_digest, list_directory(url)[0])
    if index is not None:
        _keep_to_budget(source, data, _unreadable_of(index), len(record_set.records))
        return index
    _keep_to_budget(source, data, _absent(record_set), len(record_set.records))
    with sole_writer(url):
        present, _ = list_directory(url)
        for name in present:
            if name == HEADER_FILE or name.endswith(".tmp"):
                # The old index must not outlive the first shard that is written over.
                remove(f"{url}/{name}")
        infos = _write_missing(source, data, plan, present, run_tasks, progress)
        index = write_index(
            url,
            source.name,
            record_set.vocabulary,
            [(info.shard, info.columns) for info in infos if info.shard.count],
            inputs_digest=inputs_digest,
            report=_report(record_set, infos),
        )
        _remove_others(url, present, plan, index)
    return index


def _absent(record_set: RecordSet) -> list[tuple[str, str]]:
    """Images that storage does not list; columns hold only what it does."""
    if isinstance(record_set.records, RecordColumns):
        return []
    return [(r.key, f"{r.path}: absent") for r in record_set.records if r.num_bytes is None]


def _prepared_index(url: str, inputs_digest: str, present: dict[str, int]) -> Index | None:
    """The index that is there, if it is of these inputs and its shards are there in full size."""
    index = _whole_index(url, present)
    return index if index is not None and index.inputs_digest == inputs_digest else None


def _whole_index(url: str, present: dict[str, int]) -> Index | None:
    """The index that is there, if its shards are there in full size."""
    if scheme_of(url) in ("http", "https"):
        # Web servers need not list, and tell no sizes; reading notices what is not whole.
        return load_index(url)
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
    data: Shards,
    plan: ShardPlan,
    present: dict[str, int],
    run_tasks: RunTasks,
    progress: Progress | None,
) -> list[ShardInfo]:
    """What every task gives, in their order; those whose shard is finished are not run."""

    def find(k: int) -> ShardInfo | None:
        return finished_shard(plan.url_of(k), plan.digests[k], present)

    with ThreadPoolExecutor(_LISTERS) as pool:
        infos = list(pool.map(find, range(len(plan))))
    missing = [k for k, info in enumerate(infos) if info is None]
    total = sum(plan.count_of(k) for k in range(len(plan)))
    done = total - sum(plan.count_of(k) for k in missing)
    unreadable = [entry for info in infos if info for entry in info.unreadable]
    written, started = 0, time.monotonic()
    if progress:
        progress(done, total, "")
    for position, info in run_tasks(write_shard, MissingShards(plan, missing)):
        infos[missing[position]] = info
        unreadable.extend(info.unreadable)
        _keep_to_budget(source, data, unreadable, total)
        done += plan.count_of(missing[position])
        written += info.shard.num_bytes
        if progress:
            progress(done, total, f"{written / 1e6 / (time.monotonic() - started):.1f} MB/s")
    finished = [info for info in infos if info is not None]
    assert len(finished) == len(plan), "run_tasks left out a task"
    _keep_to_budget(source, data, unreadable, total)
    return finished


def _remove_others(url: str, present: dict[str, int], plan: ShardPlan, index: Index) -> None:
    """Remove shards and sidecars that are no part of the source any longer."""
    kept = {shard.file for shard in index.shards}
    kept |= {sidecar_url(plan.url_of(k)).rsplit("/", 1)[-1] for k in range(len(plan))}
    for name in present:
        if (re.fullmatch(r"\d{6,}\.(tar|json)", name) and name not in kept) or name == "index.npz":
            remove(f"{url}/{name}")


def _report(record_set: RecordSet, infos: Sequence[ShardInfo]) -> dict[str, object]:
    scaled: Counter[str] = Counter()
    for info in infos:
        scaled.update(info.scaled)
    return {
        "dropped": record_set.dropped,
        "examples": record_set.examples,
        "unreadable": [entry for info in infos for entry in info.unreadable],
        "scaled": dict(scaled),
    }


def _keep_to_budget(
    source: Source, data: Shards, unreadable: Sequence[tuple[str, str]], total: int
) -> None:
    if len(unreadable) <= data.bad_sample_budget:
        return
    shown = "; ".join(reason for _, reason in unreadable[:5])
    raise DataError(
        f"source {source.name}: {len(unreadable)} of {total} images cannot be read, and "
        f"data.bad_sample_budget allows {data.bad_sample_budget} ({shown}); mend the files, or "
        "raise the budget"
    )


def _unreadable_of(index: Index) -> list[tuple[str, str]]:
    entries = index.report["unreadable"]
    assert isinstance(entries, list)
    return [(key, reason) for key, reason in entries]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
