"""The plan made real: batches for training and for evaluation, read ahead."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import Batch, batch_bytes
from pipeline.data.images import decoder_name
from pipeline.data.plan.geometry import largest_canvas
from pipeline.data.plan.like_shapes import LikeShapes
from pipeline.data.plan.sampling import StreamSource
from pipeline.data.plan.slot import micro_batches
from pipeline.data.plan.steps import Plan, StepKind, build_plan
from pipeline.data.shards.index import Index
from pipeline.data.storage.files import is_local_path
from pipeline.data.stream.ledger import Ledger
from pipeline.data.stream.reader import (
    EvaluationReader,
    Reading,
    SourceReader,
    TrainJob,
    TrainReader,
)
from pipeline.data.stream.workers import Ahead, read_ahead
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import DataError
from pipeline.recipe import Data, ShardReading, Source, Training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepBatches:
    """One step of one rank. `sources` counts the samples of each source in the global batch,
    `dropped` the boxes that this rank's part was left without, by reason (`reader.LEFT_OUT`)."""

    step: int
    micro_batches: list[Batch]
    stream: StepKind
    sources: dict[str, int]
    dropped: Counter[str] = field(default_factory=Counter)


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
        decoder_name()
        sources = [*data.train, *data.extra]
        readers = source_readers(
            sources, indexes, vocabulary, data.root, data.reading, data.shuffle_shards
        )
        self.category_maps = {name: r.category_map for name, r in readers.items() if r.category_map}
        """Of each labelled source, by its name."""
        self.plan = training_plan(data, training, readers, seed)
        self.ledger = Ledger(data.bad_sample_budget)
        self._sources = readers
        self._reader = TrainReader(readers, data.transforms, data.max_boxes)
        self._workers = data.workers
        self._micro_batch = training.micro_batch
        self._rank, self._world_size = rank, world_size
        self._remote = {name for name, index in indexes.items() if not is_local_path(index.url)}
        self._reading = data.reading
        mosaics = bool(data.extra) and data.transforms.mosaic
        height, width = largest_canvas(data.transforms, training.micro_batch, mosaics=mosaics)
        self._canvas_bytes = batch_bytes(training.micro_batch, height, width)

    def leave_out(self, unlabelled: Mapping[str, Set[int]]) -> None:
        """Treat these samples of each source, which lack stored soft labels, as images that cannot
        be read: counted, with others in their places. Raises `DataError` for more than the budget.
        """
        for name, samples in unlabelled.items():
            if len(samples) > self.ledger.budget:
                raise DataError(
                    f"source {name}: {len(samples):,} images could not be read when their soft "
                    f"labels were made, more than data.bad_sample_budget {self.ledger.budget} "
                    "allows; delete these labels and make them again, or raise the budget"
                )
            self._sources[name].unlabelled = samples

    def iterate(self, start_step: int, stop_step: int, held: int = 0) -> Iterator[StepBatches]:
        """The steps from `start_step` to before `stop_step`, of which the caller holds `held`
        besides the one in use.

        Raises `DataError` for more unreadable images than the budget, `StorageError` for a damaged
        shard.
        """
        steps = range(start_step, stop_step)
        jobs = (job for step in steps for job in self._jobs(step))
        number = len(self._jobs(start_step)) if steps else 0
        fetches = _fetches(self._reading, self._micro_batch, remote=bool(self._remote))
        ahead = Ahead(number, fetches, self._canvas_bytes, held * number)
        coming = read_ahead(self._reader, jobs, workers=self._workers, ahead=ahead)
        with closing(coming) as readings:
            for step in steps:
                batches, dropped = [], Counter[str]()
                for reading in islice(readings, number):
                    self.ledger.add(reading)
                    for (_, reason), count in reading.dropped.items():
                        dropped[reason] += count
                    batches.append(_batch_of(reading))
                kind, sources = self.plan.kind(step), self.plan.sources(step)
                yield StepBatches(step, batches, kind, sources, dropped)

    def _jobs(self, step: int) -> list[TrainJob]:
        slots = self.plan.step(step, self._rank, self._world_size)
        shards: dict[str, Sequence[int]] = {}
        if self._remote and self._reading.how == "shards":
            ahead = self.plan.shards_ahead(step)
            shards = {name: ahead[name] for name in sorted(self._remote & ahead.keys())}
        return [TrainJob(part, shards) for part in micro_batches(slots, self._micro_batch)]


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
        reader = SourceReader(data.validation, index, vocabulary, reading=data.reading)
        self._reader = EvaluationReader(reader, data.transforms)
        self._workers = data.workers
        self._reading = data.reading
        self._remote = not is_local_path(index.url)
        divisor = data.transforms.size_divisor
        self._longest = -(-data.transforms.evaluation_max_side // divisor) * divisor

    def iterate(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches of this rank's contiguous part; ranks share no image and leave none out.

        Raises `DataError` for an image that cannot be decoded.
        """
        start, stop = self._bounds(rank, world_size)
        places = (range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size))
        jobs = ([self._positions[place] for place in batch] for batch in places)
        fetches = _fetches(self._reading, batch_size, remote=self._remote)
        ahead = Ahead(1, fetches, batch_bytes(batch_size, self._longest, self._longest))
        coming = read_ahead(self._reader, jobs, workers=self._workers, ahead=ahead)
        with closing(coming) as readings:
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
    sources: Sequence[Source],
    indexes: Mapping[str, Index],
    vocabulary: Vocabulary,
    root: str = "",
    reading: ShardReading | None = None,
    window_shards: int = 0,
) -> dict[str, SourceReader]:
    """A reader of each source, by name; logs which categories became the vocabulary's, by what
    rule, and which are left out. Reviewed category maps are looked for under `root`."""
    readers = {
        s.name: SourceReader(s, indexes[s.name], vocabulary, root, reading, window_shards)
        for s in sources
    }
    for name, reader in readers.items():
        found = reader.category_map
        if found is None or found.is_identity:
            continue
        logger.info(f"source {name}: {found.describe()}")
        if found.unmapped:
            number, total = len(found.unmapped), found.source.num_categories
            logger.warning(
                f"source {name}: boxes of {number} of its {total} categories are left out of "
                f"training, since the vocabulary lacks them ({', '.join(found.unmapped[:5])}"
                f"{', ...' if number > 5 else ''})"
            )
    return readers


def training_plan(
    data: Data, training: Training, readers: Mapping[str, SourceReader], seed: int
) -> Plan:
    """The plan of a recipe's data; raises `DataError` for a source without samples."""
    threshold, grouped = data.repeat_threshold, data.aspect_ratio_grouping
    repeats = data.sampling == "class_aware" or (data.sampling == "repeat_factor" and threshold > 0)
    used = [readers[source.name] for source in (*data.train, *data.extra)]
    sizes = {each.name: (each.index.height, each.index.width) for each in used} if grouped else {}
    plan = build_plan(
        [_stream_source(readers[s.name], repeats=repeats) for s in data.train],
        [_stream_source(readers[s.name], repeats=False) for s in data.extra],
        batch_size=training.batch_size,
        seed=seed,
        extra_mode=data.extra_mode,
        extra_ratio=data.extra_ratio,
        sampling=data.sampling,
        repeat_threshold=threshold,
        window_shards=data.shuffle_shards,
        mosaic=data.transforms.mosaic,
        copy_paste_probability=data.transforms.copy_paste_probability,
        like_shapes=LikeShapes(sizes, data.transforms, training.micro_batch) if grouped else None,
    )
    for name, number in plan.left_out.items():
        logger.warning(
            f"source {name}: {number} of its {readers[name].index.num_samples} images have no "
            "category and are left out of training, since data.sampling is class_aware"
        )
    return plan


def _stream_source(reader: SourceReader, *, repeats: bool) -> StreamSource:
    """What the plan needs of a source; its categories only where they make samples repeat."""
    index = reader.index
    return StreamSource(
        name=reader.name,
        num_samples=index.num_samples,
        shard_of=index.shard,
        category_offsets=index.category_offsets if repeats else np.zeros(1, dtype=np.int64),
        categories=reader.columns(index.category_ids if repeats else ()).astype(np.int32),
        weight=reader.source.weight,
        digest=reader.digest,
    )


def _fetches(reading: ShardReading, micro_batch: int, *, remote: bool) -> int:
    """Jobs whose samples a reader process asks for ahead, so that `in_flight` are on their way."""
    return -(-reading.in_flight // micro_batch) if remote and reading.how == "ranges" else 0


def _batch_of(reading: Reading) -> Batch:
    if reading.error is not None:
        raise reading.error
    assert reading.batch is not None
    return reading.batch
