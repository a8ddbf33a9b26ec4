"""Slots of the plan to a batch: read, decode, map labels, transform, collate."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.data.batch import Batch, Targets, check_targets, collate
from pipeline.data.copy_paste import copy_paste
from pipeline.data.images import decode_pixels
from pipeline.data.plan.draws import draw, generator
from pipeline.data.plan.geometry import canvas_divisor, smallest_canvas
from pipeline.data.plan.slot import Slot, substitute
from pipeline.data.sample import UNLABELLED, Sample
from pipeline.data.shards.index import Index
from pipeline.data.stream.fetch import open_source
from pipeline.data.transforms import (
    Picture,
    as_picture,
    draw_boxes,
    evaluation_transform,
    mosaic_transform,
    origins,
    train_transform,
)
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.data.vocabulary.category_map import used_map
from pipeline.errors import DataError, LongtailError
from pipeline.recipe import ShardReading, Source, Transforms

MAX_SUBSTITUTES = 8
"""How many samples in a row may be unreadable before their shard is given up."""
UNMAPPED = "boxes without a category of the vocabulary"
VANISHED = "boxes that a crop has left nothing of"
CROWDED = "boxes beyond data.max_boxes of their image"
HIDDEN = "boxes that pasted ones cover"
LEFT_OUT = (UNMAPPED, VANISHED, CROWDED, HIDDEN)
"""Why boxes are left out of training: the reasons that `Reading.dropped` counts by."""


@dataclass(frozen=True)
class Reading:
    """What a reader process hands over: a batch or the error in its place, and what it left out.

    `unreadable` has (source, sample id, reason); `dropped` counts boxes by (source, reason). An
    error travels as a value, so that it arrives as itself and not wrapped in a traceback.
    """

    batch: Batch | None = None
    error: LongtailError | None = None
    unreadable: list[tuple[str, str, str]] = field(default_factory=list)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)

    def pin_memory(self) -> "Reading":
        """The same reading with its batch in page-locked memory."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class TrainJob:
    """The slots of a micro-batch; `shards` are where the next samples of each source will be."""

    slots: Sequence[Slot]
    shards: Mapping[str, Sequence[int]] = field(default_factory=dict)


class SourceReader:
    """One source, with its category ids turned into the recipe's columns.

    `window_shards` are what the plan shuffles together.
    Raises `RecipeError` when the source has labels but no category of the vocabulary, `DataError`
    for a `category_map` (looked for under `root`) that does not fit both sides.
    """

    def __init__(
        self,
        source: Source,
        index: Index,
        vocabulary: Vocabulary,
        root: str = "",
        reading: ShardReading | None = None,
        window_shards: int = 0,
    ) -> None:
        self.name = source.name
        self.source = source
        self.index = index
        self.shards = open_source(index, reading or ShardReading(), window_shards)
        self.num_categories = vocabulary.num_categories
        self.unlabelled: Set[int] = frozenset()
        """Numbers of samples that lack stored soft labels: others take their places."""
        theirs = index.vocabulary
        self._ids = np.array(theirs.ids if source.has_labels else [], dtype=np.int64)
        self.category_map = used_map(source, theirs, vocabulary, root)
        """Which of the vocabulary's categories each of the source's is; None without labels."""
        none = np.zeros(0, dtype=np.int64)
        self._columns = none if self.category_map is None else self.category_map.columns
        self._reached = np.unique(self._columns[self._columns >= 0])

    @property
    def digest(self) -> str:
        """Of the samples and of what their labels become: the plan refuses to go on with others."""
        found = self.category_map
        return self.index.digest if found is None else f"{self.index.digest}-{found.digest}"

    def columns(self, category_ids: ArrayLike) -> NDArray[np.int64]:
        """The recipe's column of each category id, -1 where there is none; (n,) to (n,)."""
        ids = np.asarray(category_ids, dtype=np.int64)
        if not len(self._ids) or not len(ids):
            return np.full(len(ids), -1, dtype=np.int64)
        place = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[place] == ids, self._columns[place], -1)

    def known_columns(self, category_ids: Sequence[int]) -> tuple[int, ...]:
        """The recipe's columns of those category ids that have one."""
        if not category_ids:
            return ()
        columns = self.columns(category_ids)
        return tuple(columns[columns >= 0].tolist())

    def absent(self, samples: Sequence[Sample]) -> tuple[bool, tuple[int, ...]]:
        """Of an image made of `samples`: whether all columns that nothing names count as absent,
        and, if not, which.

        A category is absent only where it is from all parts of a mosaic or of a pasted image. Where
        the source's categories are some of the vocabulary's, it does not tell of the others: they
        stand on its photographs without a box.
        """
        verified = set[int].intersection(*(set(s.negative_category_ids) for s in samples))
        source = self.source
        names_all = self.category_map is None or len(self._reached) == self.num_categories
        if not source.samples_negatives or source.federated_negatives is not None or names_all:
            return source.samples_negatives, self.known_columns(sorted(verified))
        named = np.concatenate([sample.category_ids for sample in samples])
        unnamed = np.setdiff1d(self._reached, self.columns(named))
        return False, tuple(unnamed.tolist())

    def picture(self, sample: Sample) -> Picture:
        """The decoded image with its boxes; raises `DataError` when the image cannot be used."""
        return as_picture(self._pixels(sample), sample.boxes, self.columns(sample.category_ids))

    def training_picture(self, sample: Sample, index: int) -> tuple[Picture, int]:
        """The same without boxes of categories that the vocabulary lacks, and how many they are.

        Boxes that never had a category stay: nobody said that they are of another. `index` is the
        sample's number, of which its boxes keep note.
        """
        if index in self.unlabelled:
            raise DataError("it has no soft labels, for it could not be read when they were made")
        boxes, ids, columns = sample.boxes, sample.category_ids, self.columns(sample.category_ids)
        origin = origins(index, len(ids))
        if self.source.has_labels:
            kept = (columns >= 0) | (ids == UNLABELLED)
            if not kept.all():
                boxes, columns, origin = boxes[kept], columns[kept], origin[kept]
        picture = as_picture(self._pixels(sample), boxes, columns, origin)
        return picture, len(ids) - len(columns)

    def _pixels(self, sample: Sample) -> NDArray[np.uint8]:
        pixels = decode_pixels(sample.image)
        height, width, _ = pixels.shape
        if (width, height) != (sample.width, sample.height):
            raise DataError(
                f"the image has {width}x{height} pixels, but its annotation is for "
                f"{sample.width}x{sample.height}"
            )
        return pixels

    def stand_ins(self, i: int) -> range:
        """The samples that may take the place of sample `i`: those of its shard, or all."""
        shard = self.index.shard
        start = int(np.searchsorted(shard, shard[i], side="left"))
        stop = int(np.searchsorted(shard, shard[i], side="right"))
        return range(start, stop) if stop - start > 1 else range(self.index.num_samples)

    def sample_id(self, sample: Sample) -> str:
        """The name of a sample in logs and ledgers."""
        return f"{self.name}/{sample.key}"


class TrainReader:
    """A map from the slots of a micro-batch to its `Reading`; the same slots give the same bytes.

    An image has at most `max_boxes` boxes. What the padding at the end of a global batch leaves
    out is not counted, for it repeats a sample. Picklable: it goes to reader processes.
    """

    def __init__(
        self, sources: Mapping[str, SourceReader], transforms: Transforms, max_boxes: int
    ) -> None:
        self._sources = sources
        self._num_categories = next(iter(sources.values())).num_categories
        self._transforms = transforms
        self._max_boxes = max_boxes

    def expect(self, job: TrainJob) -> None:
        """Begin to fetch the samples of a job that will come, and the shards that it names."""
        for slot in job.slots:
            self._sources[slot.source].shards.expect((slot.index, *slot.partners))
        for name, shards in job.shards.items():
            self._sources[name].shards.expect_shards(shards)

    def close(self) -> None:
        """Stop fetching, and close files."""
        for source in self._sources.values():
            source.shards.close()

    def read(self, job: TrainJob, memory: Tensor | None = None) -> Reading:
        """The reading of a job, its images in `memory` where that is given and large enough."""
        slots, reading = job.slots, Reading()
        examples: dict[tuple[str, int], tuple[Picture, Targets, str]] = {}
        chosen = []
        try:
            for slot in slots:
                place = slot.stream, slot.position
                if place not in examples:
                    counted = reading if slot.weight else Reading()
                    examples[place] = self._example(slot, counted)
                picture, targets, sample_id = examples[place]
                chosen.append((picture.image, _weighted(targets, slot.weight), sample_id))
            images, all_targets, sample_ids = zip(*chosen, strict=True)
            check_targets(all_targets, self._num_categories, sample_ids)
        except LongtailError as error:
            return replace(reading, error=error)
        names = [slot.source for slot in slots]
        canvas = canvas_divisor(self._transforms), smallest_canvas(self._transforms)
        batch = collate(images, all_targets, names, sample_ids, *canvas, memory)
        return replace(reading, batch=batch)

    def _example(self, slot: Slot, reading: Reading) -> tuple[Picture, Targets, str]:
        reader = self._sources[slot.source]
        indices = (slot.index, *slot.partners)
        loaded = [self._load(reader, index, slot.seed, reading) for index in indices]
        samples = [sample for sample, _ in loaded]
        pictures = [picture for _, picture in loaded]
        rng = generator(slot.seed)
        first = samples[0]
        original_size = first.height, first.width
        if slot.stream == "extra" and slot.partners:
            picture = mosaic_transform(pictures, self._transforms, rng)
            original_size = picture.size
        else:
            samples, picture = self._with_pasted(slot, samples, pictures, reading)
            picture = train_transform(picture, self._transforms, rng, slot.shape_seed)
        if picture.vanished:
            reading.dropped[reader.name, VANISHED] += picture.vanished
        if len(picture.labels) > self._max_boxes:
            reading.dropped[reader.name, CROWDED] += len(picture.labels) - self._max_boxes
            picture = draw_boxes(picture, self._max_boxes, rng)
        sampled_negatives, absent = reader.absent(samples)
        partial = set().union(*(sample.not_exhaustive_category_ids for sample in samples))
        source = reader.source
        # What is on a picture without a label is unknown, and so on all that it is a part of.
        labelled = source.has_labels and not any(_is_unlabelled(sample) for sample in samples)
        # Labels that are not learnt must not reach the matching or the denoising queries either.
        labels = picture.labels if source.use_class else torch.full_like(picture.labels, -1)
        targets = Targets(
            boxes=picture.normalised_boxes(),
            labels=labels,
            image_id=first.image_id,
            size=picture.size,
            original_size=original_size,
            seed=slot.seed,
            coarse=any(sample.coarse for sample in samples),
            extra=slot.stream == "extra",
            negative_categories=absent,
            not_exhaustive_categories=reader.known_columns(sorted(partial)),
            sampled_negatives=sampled_negatives,
            class_weight=float(source.use_class and labelled),
            box_weight=float(source.use_box),
            semantic_weight=float(source.use_semantic),
            origin=picture.origin,
        )
        sample_id = reader.sample_id(first)
        return picture, targets, sample_id

    def _with_pasted(
        self, slot: Slot, samples: list[Sample], pictures: list[Picture], reading: Reading
    ) -> tuple[list[Sample], Picture]:
        """A photograph with boxes of its partner, and the samples that it is then made of."""
        # Whole-image boxes of coarse labels would paste photographs into each other.
        if len(samples) == 1 or samples[1].coarse:
            return samples[:1], pictures[0]
        rng = generator(draw(slot.seed, "copy_paste"))
        pasted = copy_paste(pictures[0], pictures[1], self._transforms, rng)
        if not pasted.num_pasted:
            return samples[:1], pictures[0]
        if pasted.num_hidden:
            reading.dropped[slot.source, HIDDEN] += pasted.num_hidden
        return samples, pasted.picture

    def _load(
        self, reader: SourceReader, index: int, seed: int, reading: Reading
    ) -> tuple[Sample, Picture]:
        """A sample, or the next of its chain of substitutes whose image can be used."""
        for attempt in range(MAX_SUBSTITUTES):
            sample = reader.shards.sample(index)
            try:
                picture, num_unmapped = reader.training_picture(sample, index)
            except DataError as error:
                reading.unreadable.append((reader.name, reader.sample_id(sample), str(error)))
                stand_ins = reader.stand_ins(index)
                if len(stand_ins) == 1:
                    break
                index = substitute(seed, index, attempt, stand_ins)
                continue
            if num_unmapped:
                reading.dropped[reader.name, UNMAPPED] += num_unmapped
            return sample, picture
        raise DataError(
            f"source {reader.name}: {attempt + 1} unreadable images in a row, the last "
            f"is {reading.unreadable[-1][1]} ({reading.unreadable[-1][2]}); prepare the source "
            "again from good images"
        )


class EvaluationReader:
    """A map from sample numbers to a batch at evaluation size, with the true boxes.

    Boxes of categories outside the vocabulary have label -1. An image that cannot be decoded is an
    error, since leaving it out would change the result.
    """

    def __init__(self, reader: SourceReader, transforms: Transforms) -> None:
        self._reader = reader
        self._transforms = transforms

    def expect(self, indices: Sequence[int]) -> None:
        """Begin to fetch these samples."""
        self._reader.shards.expect(indices)

    def close(self) -> None:
        """Stop fetching, and close files."""
        self._reader.shards.close()

    def read(self, indices: Sequence[int], memory: Tensor | None = None) -> Reading:
        """The reading of these samples, its images in `memory` where that is large enough."""
        try:
            examples = [self._example(index) for index in indices]
        except LongtailError as error:
            return Reading(error=error)
        images, targets, sample_ids = zip(*examples, strict=True)
        names = [self._reader.name] * len(indices)
        divisor = self._transforms.size_divisor
        batch = collate(images, targets, names, sample_ids, divisor, memory=memory)
        return Reading(batch=batch)

    def _example(self, index: int) -> tuple[Tensor, Targets, str]:
        sample = self._reader.shards.sample(index)
        sample_id = self._reader.sample_id(sample)
        try:
            picture = self._reader.picture(sample)
        except DataError as error:
            raise DataError(
                f"{sample_id}: {error}; an evaluation needs every image: prepare the source again"
            ) from None
        picture = evaluation_transform(picture, self._transforms)
        targets = Targets(
            boxes=picture.normalised_boxes(),
            labels=picture.labels,
            image_id=sample.image_id,
            size=picture.size,
            original_size=(sample.height, sample.width),
            coarse=sample.coarse,
            negative_categories=self._reader.known_columns(sample.negative_category_ids),
            not_exhaustive_categories=self._reader.known_columns(
                sample.not_exhaustive_category_ids
            ),
        )
        check_targets([targets], self._reader.num_categories, [sample_id])
        return picture.image, targets, sample_id


def _is_unlabelled(sample: Sample) -> bool:
    return UNLABELLED in sample.category_ids.tolist()


def _weighted(targets: Targets, weight: int) -> Targets:
    if weight:
        return targets
    return replace(targets, class_weight=0.0, box_weight=0.0, semantic_weight=0.0)
