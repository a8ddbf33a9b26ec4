"""The plan made real: batches for training and for evaluation, read ahead."""

import logging
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from pipeline.data.batch import Batch
from pipeline.data.index import Index
from pipeline.data.plan import Plan, Slot, StepKind, StreamSource, build_plan, micro_batches
from pipeline.data.reader import (
    EvaluationReader,
    PackedReading,
    Reading,
    SourceReader,
    TrainReader,
)
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import DataError
from pipeline.recipe import Data, Source, Training

logger = logging.getLogger(__name__)

Job = TypeVar("Job", contravariant=True)


class Reader(Protocol[Job]):
    """Picklable map from a job to a reading."""

    def __getitem__(self, job: Job, /) -> Reading: ...


@dataclass(frozen=True)
class StepBatches:
    """One step of one rank. `sources` counts the samples of each source in the global batch."""

    step: int
    micro_batches: list[Batch]
    stream: StepKind
    sources: dict[str, int]


@dataclass
class Ledger:
    """What was left out of training: boxes by (source, reason), unreadable images by sample id.

    More than `budget` unreadable images of one source raise `DataError`.
    """

    budget: int
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, reading: Reading) -> None:
        """Enter what a reading left out; the first of each kind is logged."""
        for place, count in reading.dropped.items():
            if place not in self.dropped:
                logger.info("source %s: %s are left out of training", *place)
            self.dropped[place] += count
        for source, sample_id, reason in reading.unreadable:
            if sample_id in self.unreadable:
                continue
            self.unreadable[sample_id] = reason
            logger.warning("%s: %s; another sample takes its place", sample_id, reason)
            bad = [known for known in self.unreadable if known.startswith(f"{source}/")]
            if len(bad) > self.budget:
                raise DataError(
                    f"source {source}: {len(bad)} images cannot be read, more than "
                    f"data.bad_sample_budget {self.budget} allows (the last is {sample_id}: "
                    f"{reason}); repair or remove them and prepare again, or raise the budget"
                )


class Stream:
    """Training batches of one rank, from any step on.

    Opens nothing before `iterate`. Raises `RecipeError` when a labelled source has no category of
    the vocabulary, `DataError` when a source is empty.
    """

    def __init__(
        self,
        data: Data,
        training: Training,
        indexes: Mapping[str, Index],
        vocabulary: Vocabulary,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        readers = source_readers([*data.train, *data.extra], indexes, vocabulary)
        self.plan = training_plan(data, training, readers, seed)
        self.ledger = Ledger(data.bad_sample_budget)
        self._reader = TrainReader(readers, data.transforms)
        self._workers = data.workers
        self._micro_batch = training.micro_batch
        self._rank, self._world_size = rank, world_size

    def iterate(self, start_step: int, stop_step: int) -> Iterator[StepBatches]:
        """The steps from `start_step` to before `stop_step`.

        Raises `DataError` for more unreadable images than the budget, `StorageError` for a damaged
        shard.
        """
        steps = range(start_step, stop_step)
        jobs = (job for step in steps for job in self._jobs(step))
        number = len(self._jobs(start_step)) if steps else 0
        ahead = read_ahead(self._reader, jobs, workers=self._workers, depth=number)
        with closing(ahead) as readings:
            for step in steps:
                batches = []
                for reading in islice(readings, number):
                    self.ledger.add(reading)
                    batches.append(_batch_of(reading))
                yield StepBatches(step, batches, self.plan.kind(step), self.plan.sources(step))

    def _jobs(self, step: int) -> list[list[Slot]]:
        slots = self.plan.step(step, self._rank, self._world_size)
        return micro_batches(slots, self._micro_batch)


class EvaluationSet:
    """Images of the validation source, each once, in index order: all, or those of `image_ids`."""

    def __init__(
        self,
        data: Data,
        index: Index,
        vocabulary: Vocabulary,
        image_ids: NDArray[np.int64] | None = None,
    ) -> None:
        assert data.validation is not None
        every = np.arange(index.num_samples)
        chosen = every if image_ids is None else every[np.isin(index.image_id, image_ids)]
        self._positions: list[int] = chosen.tolist()
        self.num_images = len(self._positions)
        reader = SourceReader(data.validation, index, vocabulary)
        self._reader = EvaluationReader(reader, data.transforms)
        self._workers = data.workers

    def iterate(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches of this rank's contiguous part; ranks share no image and leave none out.

        Raises `DataError` for an image that cannot be decoded.
        """
        start, stop = self._bounds(rank, world_size)
        places = (range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size))
        jobs = ([self._positions[place] for place in batch] for batch in places)
        ahead = read_ahead(self._reader, jobs, workers=self._workers, depth=1)
        with closing(ahead) as readings:
            for reading in readings:
                yield _batch_of(reading)

    def num_images_of(self, rank: int, world_size: int) -> int:
        """How many images this rank's part has."""
        start, stop = self._bounds(rank, world_size)
        return stop - start

    def _bounds(self, rank: int, world_size: int) -> tuple[int, int]:
        first, after = rank * self.num_images, (rank + 1) * self.num_images
        return first // world_size, after // world_size


def source_readers(
    sources: Sequence[Source], indexes: Mapping[str, Index], vocabulary: Vocabulary
) -> dict[str, SourceReader]:
    """A reader of each source, by name; logs what the vocabulary does not have."""
    readers = {s.name: SourceReader(s, indexes[s.name], vocabulary) for s in sources}
    for name, reader in readers.items():
        if reader.unmapped:
            number, total = len(reader.unmapped), reader.index.vocabulary.num_categories
            logger.warning(
                f"source {name}: boxes of {number} of its {total} categories are left out of "
                f"training, since the vocabulary lacks them ({', '.join(reader.unmapped[:5])}"
                f"{', ...' if number > 5 else ''})"
            )
    return readers


def training_plan(
    data: Data, training: Training, readers: Mapping[str, SourceReader], seed: int
) -> Plan:
    """The plan of a recipe's data; raises `DataError` for a source without samples."""
    threshold = data.repeat_threshold
    return build_plan(
        [_stream_source(readers[s.name], repeats=threshold > 0) for s in data.train],
        [_stream_source(readers[s.name], repeats=False) for s in data.extra],
        batch_size=training.batch_size,
        seed=seed,
        extra_mode=data.extra_mode,
        extra_ratio=data.extra_ratio,
        repeat_threshold=threshold,
        mosaic=data.transforms.mosaic,
    )


def read_ahead(
    reader: Reader[Job], jobs: Iterable[Job], *, workers: int, depth: int
) -> Generator[Reading]:
    """`reader[job]` of each job in order, while the next `depth` jobs are already being read.

    With `workers` the reading is done in so many processes, else in one thread.
    """
    pin_memory = torch.cuda.is_available()
    if not workers:
        yield from _read_in_thread(reader, jobs, depth, pin_memory)
        return
    # Not fork: the training process has threads (Ray, gloo, CUDA). The server imports torch once
    # for all of its children.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader: DataLoader[PackedReading] = DataLoader(
        reader,  # type: ignore[arg-type]
        sampler=jobs,
        batch_size=None,
        collate_fn=Reading.pack,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=max(2, -(-2 * depth // workers)),
        multiprocessing_context=context,
        worker_init_fn=_exit_with_parent,
        pin_memory=pin_memory,
    )
    for packed in loader:
        yield packed.unpack()


def _exit_with_parent(worker: int) -> None:
    """End a reader process when the training process is killed.

    The DataLoader's own watchdog looks at the process above the reader, which is the server; the
    server in turn stays as long as it has readers.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name=f"watch-parent-{worker}", daemon=True).start()


def _read_in_thread(
    reader: Reader[Job], jobs: Iterable[Job], depth: int, pin_memory: bool
) -> Generator[Reading]:
    def read(job: Job) -> Reading:
        reading = reader[job]
        return reading.pin_memory() if pin_memory else reading

    waiting: deque[Future[Reading]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="reader")
    try:
        for job in jobs:
            waiting.append(pool.submit(read, job))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _stream_source(reader: SourceReader, *, repeats: bool) -> StreamSource:
    """What the plan needs of a source; its categories only where they make samples repeat."""
    index = reader.index
    return StreamSource(
        name=reader.name,
        num_samples=index.num_samples,
        shard_of=index.shard,
        category_offsets=index.category_offsets if repeats else np.zeros(1, dtype=np.int64),
        categories=reader.columns(index.category_ids if repeats else ()),
        weight=reader.source.weight,
        digest=index.digest,
    )


def _batch_of(reading: Reading) -> Batch:
    if reading.error is not None:
        raise reading.error
    assert reading.batch is not None
    return reading.batch
