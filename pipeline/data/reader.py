"""Slots of the plan to a batch: read, decode, map labels, transform, collate."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.batch import Batch, Targets, collate
from pipeline.data.images import decode_image
from pipeline.data.index import Index
from pipeline.data.plan import Slot, substitute
from pipeline.data.sample import Sample
from pipeline.data.transforms import (
    Picture,
    as_picture,
    evaluation_transform,
    mosaic_transform,
    train_transform,
)
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import DataError, LongtailError, RecipeError
from pipeline.recipe import Source, Transforms

MAX_SUBSTITUTES = 8
"""How many samples in a row may be unreadable before their shard is given up."""
UNMAPPED = "boxes without a category of the vocabulary"
VANISHED = "boxes that a crop has left nothing of"


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

    def pack(self) -> "PackedReading":
        """The same reading for another process."""
        batch = self.batch
        if batch is None:
            return PackedReading(self, None)
        small = [
            {**vars(t), "boxes": t.boxes.numpy(), "labels": t.labels.numpy()} for t in batch.targets
        ]
        bare = replace(self, batch=replace(batch, targets=[]))
        return PackedReading(bare, small)


@dataclass(frozen=True)
class PackedReading:
    """A reading on its way between processes, with the fields of its targets apart.

    Each tensor that is sent costs a file descriptor and a handshake, so boxes and labels, which
    are small, go as numpy arrays.
    """

    reading: Reading
    targets: list[dict[str, Any]] | None

    def pin_memory(self) -> "PackedReading":
        """The same with its images in page-locked memory."""
        return replace(self, reading=self.reading.pin_memory())

    def unpack(self) -> Reading:
        """The reading that was packed."""
        if self.targets is None or self.reading.batch is None:
            return self.reading
        tensors = [
            {name: torch.from_numpy(fields[name]) for name in ("boxes", "labels")}
            for fields in self.targets
        ]
        targets = [Targets(**{**f, **t}) for f, t in zip(self.targets, tensors, strict=True)]
        return replace(self.reading, batch=replace(self.reading.batch, targets=targets))


class SourceReader:
    """One source, with its category ids turned into the recipe's columns.

    Raises `RecipeError` when the source has labels but no category of the vocabulary.
    """

    def __init__(self, source: Source, index: Index, vocabulary: Vocabulary) -> None:
        self.name = source.name
        self.source = source
        self.index = index
        theirs = index.vocabulary
        self._ids = np.array(theirs.ids if source.has_labels else [], dtype=np.int64)
        self._columns = vocabulary.columns_from(theirs)[: len(self._ids)]
        self.unmapped = [theirs.names[k] for k in np.flatnonzero(self._columns < 0)]
        """Names of the categories that the vocabulary does not have."""
        if self.unmapped and len(self.unmapped) == len(self._ids):
            raise RecipeError(
                f"source {self.name}: none of its {len(self._ids)} categories is one of the "
                f"vocabulary's {vocabulary.num_categories}; choose another data.vocabulary, or set "
                "use_labels: false for this source"
            )

    def columns(self, category_ids: ArrayLike) -> NDArray[np.int64]:
        """The recipe's column of each category id, -1 where there is none; (n,) to (n,)."""
        ids = np.asarray(category_ids, dtype=np.int64)
        if not len(self._ids):
            return np.full(len(ids), -1, dtype=np.int64)
        place = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[place] == ids, self._columns[place], -1)

    def picture(self, sample: Sample) -> Picture:
        """The decoded image with its boxes; raises `DataError` when the image cannot be used."""
        image: Image.Image = decode_image(sample.image)
        if image.size != (sample.width, sample.height):
            raise DataError(
                f"the image has {image.width}x{image.height} pixels, but its annotation is for "
                f"{sample.width}x{sample.height}"
            )
        return as_picture(image, sample.boxes, self.columns(sample.category_ids))

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

    Picklable: it goes to reader processes.
    """

    def __init__(self, sources: Mapping[str, SourceReader], transforms: Transforms) -> None:
        self._sources = sources
        self._transforms = transforms

    def __getitem__(self, slots: Sequence[Slot]) -> Reading:
        reading = Reading()
        examples: dict[tuple[str, int], tuple[Picture, Targets, str]] = {}
        chosen = []
        try:
            for slot in slots:
                place = slot.stream, slot.position
                if place not in examples:
                    examples[place] = self._example(slot, reading)
                picture, targets, sample_id = examples[place]
                chosen.append((picture.image, _weighted(targets, slot.weight), sample_id))
        except LongtailError as error:
            return replace(reading, error=error)
        images, all_targets, sample_ids = zip(*chosen, strict=True)
        names = [slot.source for slot in slots]
        divisor = self._transforms.size_divisor
        return replace(reading, batch=collate(images, all_targets, names, sample_ids, divisor))

    def _example(self, slot: Slot, reading: Reading) -> tuple[Picture, Targets, str]:
        reader = self._sources[slot.source]
        indices = (slot.index, *slot.partners)
        loaded = [self._load(reader, index, slot.seed, reading) for index in indices]
        samples = [sample for sample, _ in loaded]
        pictures = [picture for _, picture in loaded]
        rng = np.random.Generator(np.random.Philox(key=slot.seed))
        first = samples[0]
        original_size = first.height, first.width
        if slot.partners:
            picture = mosaic_transform(pictures, self._transforms, rng)
            original_size = picture.size
        else:
            picture = train_transform(pictures[0], self._transforms, rng)
        if picture.vanished:
            reading.dropped[reader.name, VANISHED] += picture.vanished
        # A category is absent from a mosaic only where it is from all of its parts.
        absent = set.intersection(*(set(sample.negative_category_ids) for sample in samples))
        partial = set().union(*(sample.not_exhaustive_category_ids for sample in samples))
        source = reader.source
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
            negative_categories=_known(reader.columns(sorted(absent))),
            not_exhaustive_categories=_known(reader.columns(sorted(partial))),
            class_weight=float(source.use_class and source.has_labels),
            box_weight=float(source.use_box),
            semantic_weight=float(source.use_semantic),
        )
        return picture, targets, reader.sample_id(first)

    def _load(
        self, reader: SourceReader, index: int, seed: int, reading: Reading
    ) -> tuple[Sample, Picture]:
        """A sample, or the next of its chain of substitutes whose image can be used."""
        for attempt in range(MAX_SUBSTITUTES):
            sample = reader.index.read(index)
            try:
                picture = reader.picture(sample)
            except DataError as error:
                reading.unreadable.append((reader.name, reader.sample_id(sample), str(error)))
                stand_ins = reader.stand_ins(index)
                if len(stand_ins) == 1:
                    break
                index = substitute(seed, index, attempt, stand_ins)
                continue
            return sample, self._without_unmapped(reader, picture, reading)
        raise DataError(
            f"source {reader.name}: {len(reading.unreadable)} unreadable images in a row, the last "
            f"is {reading.unreadable[-1][1]} ({reading.unreadable[-1][2]}); prepare the source "
            "again from good images"
        )

    def _without_unmapped(
        self, reader: SourceReader, picture: Picture, reading: Reading
    ) -> Picture:
        if not reader.source.has_labels:
            return picture
        kept = picture.labels >= 0
        if kept.all():
            return picture
        reading.dropped[reader.name, UNMAPPED] += int((~kept).sum())
        return picture.keep(kept)


class EvaluationReader:
    """A map from sample numbers to a batch at evaluation size, with the true boxes.

    Boxes of categories outside the vocabulary have label -1. An image that cannot be decoded is an
    error, since leaving it out would change the result.
    """

    def __init__(self, reader: SourceReader, transforms: Transforms) -> None:
        self._reader = reader
        self._transforms = transforms

    def __getitem__(self, indices: Sequence[int]) -> Reading:
        try:
            examples = [self._example(index) for index in indices]
        except LongtailError as error:
            return Reading(error=error)
        images, targets, sample_ids = zip(*examples, strict=True)
        names = [self._reader.name] * len(indices)
        divisor = self._transforms.size_divisor
        return Reading(batch=collate(images, targets, names, sample_ids, divisor))

    def _example(self, index: int) -> tuple[Tensor, Targets, str]:
        sample = self._reader.index.read(index)
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
            negative_categories=_known(self._reader.columns(sample.negative_category_ids)),
            not_exhaustive_categories=_known(
                self._reader.columns(sample.not_exhaustive_category_ids)
            ),
        )
        return picture.image, targets, sample_id


def _known(columns: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(columns[columns >= 0].tolist())


def _weighted(targets: Targets, weight: int) -> Targets:
    if weight:
        return targets
    return replace(targets, class_weight=0.0, box_weight=0.0, semantic_weight=0.0)
