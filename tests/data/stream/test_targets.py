"""What stands in the targets of a batch: boxes on their objects, labels, switches, weights."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_world import (
    COLOURS,
    SMALL,
    VOCABULARY,
    a_source,
    a_stream,
    colour_at,
    draw_record,
    fingerprints,
    index_of,
    make_index,
    some_data,
)
from small_dino import SMALL as SMALL_DINO

from pipeline.data.sample import UNLABELLED, Sample
from pipeline.data.shards.index import Index
from pipeline.data.stream.reader import CROWDED, UNMAPPED, VANISHED
from pipeline.data.transforms import Picture
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.detectors import build_detector
from pipeline.detectors.interface import LossContext
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import DetectorSection, Semantic
from pipeline.semantics.branch import SemanticBranch
from pipeline.training.student import Student


def test_boxes_stand_on_objects_of_their_label(indexes: dict[str, Index]) -> None:
    checked = 0
    for step in a_stream(indexes, some_data()).iterate(0, 12):
        for batch in step.micro_batches:
            assert type(batch.images) is torch.Tensor and batch.images.dtype == torch.uint8
            assert batch.mask.dtype == torch.bool
            assert batch.images.shape[2] % 32 == 0 and batch.images.shape[3] % 32 == 0
            for i, targets in enumerate(batch.targets):
                height, width = targets.size
                assert not batch.mask[i, :height, :width].any()
                assert batch.mask[i].sum() == batch.mask[i].numel() - height * width
                assert type(targets.boxes) is torch.Tensor
                assert targets.boxes.dtype == torch.float32 and targets.labels.dtype == torch.int64
                assert len(targets.boxes) == len(targets.labels)
                assert targets.coarse == (step.stream == "extra")
                for box, label in zip(targets.boxes, targets.labels, strict=True):
                    if box[2] * width < 6 or box[3] * height < 6:
                        continue
                    expected = COLOURS[VOCABULARY.ids[int(label)]]
                    assert np.abs(np.subtract(colour_at(batch, i, box), expected)).max() < 40
                    checked += 1
    assert checked > 100


def test_mosaic_has_the_parts_of_four_samples(indexes: dict[str, Index]) -> None:
    data = some_data(
        transforms=SMALL.model_copy(update={"crop_probability": 0.0, "extra_crop_probability": 0.0})
    )
    step = next(a_stream(indexes, data).iterate(1, 2))
    for batch in step.micro_batches:
        for targets in batch.targets:
            assert targets.size == targets.original_size == (64, 64)
            assert len(targets.boxes) == 4 and targets.coarse
    single = some_data(transforms=SMALL.model_copy(update={"mosaic": False}))
    step = next(a_stream(indexes, single).iterate(1, 2))
    assert all(len(t.boxes) <= 1 for batch in step.micro_batches for t in batch.targets)


@pytest.mark.parametrize("mosaic", [True, False])
def test_no_image_has_more_boxes_than_the_cap(
    indexes: dict[str, Index], tmp_path: Path, mosaic: bool
) -> None:
    """Those that stay are drawn anew for each use of a sample, for any world size alike."""
    crowd = make_index(tmp_path, "train", VOCABULARY, [[3, 5, 8, 5, 3, 8], [3], [5, 8, 3, 5]])
    changes = {"crop_probability": 0.0, "extra_crop_probability": 0.0, "flip_probability": 0.0}
    transforms = SMALL.model_copy(update={**changes, "mosaic": mosaic})
    data = some_data(transforms=transforms, repeat_threshold=0, max_boxes=2)
    counts = {"train/000000": 2, "train/000001": 1, "train/000002": 2}
    kept: set[tuple[float, ...]] = set()
    counted = []
    for world_size in (1, 4):
        dropped: Counter[tuple[str, str]] = Counter()
        for rank in range(world_size):
            # Alone in its micro-batch, what pads a step would be read and counted once more.
            stream = a_stream({**indexes, "train": crowd}, data, rank, world_size, micro_batch=1)
            for step in stream.iterate(0, 12):
                dropped.update({(step.stream, why): n for why, n in step.dropped.items()})
                for batch in step.micro_batches:
                    for targets, name in zip(batch.targets, batch.sample_ids, strict=True):
                        assert len(targets.labels) == len(targets.boxes) <= 2
                        assert len(targets.boxes) == counts.get(name, len(targets.boxes))
                        if name == "train/000000":
                            kept.add(tuple(targets.boxes[:, 0].tolist()))
        counted.append(dropped)
    assert counted[0] == counted[1]
    # Six train steps of six images: each of the three twice, without its boxes beyond two.
    assert counted[0]["train", CROWDED] == 6 * 2 * (4 + 0 + 2)
    assert (counted[0]["extra", CROWDED] > 0) == mosaic
    assert len(kept) > 4, "not always the same two"


def sliver_index(folder: Path, name: str) -> Index:
    """Six images of two boxes each, so narrow that less than a pixel of any is left by a crop."""
    rng = np.random.default_rng(7)
    boxes = np.array([[4, 2, 4.2, 30], [20, 5, 20.2, 30]], dtype=np.float32)
    drawn = [draw_record(folder, name, i, [3, 5], rng) for i in range(6)]
    return index_of(folder, name, VOCABULARY, [replace(record, boxes=boxes) for record in drawn])


def test_boxes_that_crops_leave_nothing_of_are_counted_and_empty_images_train(
    tmp_path: Path,
) -> None:
    indexes = {name: sliver_index(tmp_path, name) for name in ("train", "extra")}
    always = {"crop_probability": 1.0, "extra_crop_probability": 1.0}
    data = some_data(transforms=SMALL.model_copy(update=always), repeat_threshold=0)
    counted, without = [], []
    for world_size in (1, 4):
        dropped: Counter[tuple[str, str]] = Counter()
        left = Counter({"train": 0, "extra": 0})
        for rank in range(world_size):
            stream = a_stream(indexes, data, rank, world_size, micro_batch=1)
            for step in stream.iterate(0, 6):
                dropped.update({(step.stream, why): n for why, n in step.dropped.items()})
                for batch in step.micro_batches:
                    # What pads a step repeats another rank's image, and is not counted.
                    left[step.stream] += sum(len(t.boxes) for t in batch.targets if t.box_weight)
                    if world_size == 1 and not len(batch.targets[0].boxes):
                        without.append(batch)
        # Three steps of six images each, of two boxes, or of four parts with two boxes.
        assert dropped["train", VANISHED] == 3 * 6 * 2 - left["train"] > 0
        assert dropped["extra", VANISHED] == 3 * 6 * 4 * 2 and left["extra"] == 0
        counted.append((dropped, left))
    assert counted[0] == counted[1]

    torch.manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    detector = build_detector(
        DetectorSection.model_validate(SMALL_DINO), num_categories=3, text_embeddings=text
    )
    branch = SemanticBranch(detector.feature_dim, text, 20.0, Semantic())
    student = Student(detector, branch, Semantic())
    assert {name for batch in without for name in batch.source} == {"train", "extra"}
    for batch in (without[0], without[-1]):
        context = LossContext(1.0, torch.arange(3), 1.0)
        soft = [torch.zeros(0, 3)]
        losses = student(batch.images, batch.mask, batch.targets, context, soft)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        assert torch.isfinite(total) and total > 0
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_under_the_cap_nothing_changes(indexes: dict[str, Index]) -> None:
    few, many = (
        fingerprints(list(a_stream(indexes, some_data(max_boxes=cap)).iterate(0, 6)))
        for cap in (12, 1000)
    )
    assert few == many


def test_boxes_in_a_shard_that_are_none_are_named(indexes: dict[str, Index]) -> None:
    stream = a_stream(indexes, some_data(extra=[]))
    reader = stream._reader._sources["train"]
    picture = reader.training_picture

    def spoilt(sample: Sample, index: int) -> tuple[Picture, int]:
        found, num_unmapped = picture(sample, index)
        found.boxes[:, 0] = torch.nan
        return replace(found, labels=torch.full_like(found.labels, 1)), num_unmapped

    reader.training_picture = spoilt  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"train/00000\d: box 0 is \[nan"):
        next(stream.iterate(0, 1))


def test_switches_and_unlabelled_sources(indexes: dict[str, Index]) -> None:
    data = some_data(
        train=[a_source("train", use_box=False)],
        extra=[a_source("plain", use_labels=False, use_semantic=False)],
    )
    train, extra = a_stream(indexes, data).iterate(0, 2)
    for batch in train.micro_batches:
        for targets in batch.targets:
            weights = targets.class_weight, targets.box_weight, targets.semantic_weight
            assert weights == (1, 0, 1)
    numbers = []
    for batch in extra.micro_batches:
        for targets in batch.targets:
            weights = targets.class_weight, targets.box_weight, targets.semantic_weight
            assert weights == (0, 1, 0)
            assert (targets.labels == -1).all()
            numbers.append(len(targets.boxes))
    assert sum(numbers) > 6


def test_labels_that_the_recipe_drops_are_not_seen(indexes: dict[str, Index]) -> None:
    data = some_data(extra=[a_source("extra", use_labels=False)])
    step = next(a_stream(indexes, data).iterate(1, 2))
    labels = torch.cat([t.labels for batch in step.micro_batches for t in batch.targets])
    assert len(labels) > 6 and (labels == -1).all()


def test_labels_that_are_not_learnt_leave_the_boxes_in_place(indexes: dict[str, Index]) -> None:
    learnt = next(a_stream(indexes, some_data()).iterate(0, 1))
    boxes_only = some_data(train=[a_source("train", use_class=False)])
    step = next(a_stream(indexes, boxes_only).iterate(0, 1))
    for batch, full in zip(step.micro_batches, learnt.micro_batches, strict=True):
        for targets, labelled in zip(batch.targets, full.targets, strict=True):
            assert torch.equal(targets.boxes, labelled.boxes)
            assert (targets.labels == -1).all() and (labelled.labels >= 0).all()
            assert targets.class_weight == 0


def test_images_without_boxes_are_in_the_stream(indexes: dict[str, Index]) -> None:
    data = some_data(
        extra=[],
        transforms=SMALL.model_copy(
            update={"crop_probability": 0.0, "extra_crop_probability": 0.0}
        ),
    )
    steps = a_stream(indexes, data).iterate(0, 4)
    targets = [t for step in steps for batch in step.micro_batches for t in batch.targets]
    empty = [t for t in targets if not len(t.boxes)]
    assert {t.image_id for t in empty} == {2, 7}
    assert all(t.boxes.shape == (0, 4) and t.labels.dtype == torch.int64 for t in empty)


def test_negative_categories_are_columns(indexes: dict[str, Index]) -> None:
    step = next(a_stream(indexes, some_data()).iterate(0, 1))
    for batch in step.micro_batches:
        for targets in batch.targets:
            # 77 is no category of the vocabulary.
            assert set(targets.negative_categories) == {0, 2}
            assert targets.not_exhaustive_categories == (1,)


def test_unmapped_categories_are_dropped_counted_and_reported(
    indexes: dict[str, Index], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    categories = [Category(99, "lemon"), Category(3, "unlike anything"), Category(5, "Leaf")]
    other = make_index(tmp_path, "other", Vocabulary(categories), [[99, 5], [5], [3, 99, 99]])
    data = some_data(
        train=[a_source("other")],
        extra=[],
        repeat_threshold=0,
        transforms=SMALL.model_copy(
            update={"crop_probability": 0.0, "extra_crop_probability": 0.0}
        ),
    )
    with caplog.at_level(logging.WARNING):
        stream = a_stream({"other": other}, data, batch_size=3)
    assert "source other: boxes of 2 of its 3 categories" in caplog.text
    assert "unlike anything, lemon" in caplog.text
    steps = list(stream.iterate(0, 4))
    targets = [t for step in steps for batch in step.micro_batches for t in batch.targets]
    labels = [t.labels.tolist() for t in targets if t.box_weight]
    assert sorted(labels) == [[]] * 4 + [[1]] * 8
    for step in steps:
        for batch in step.micro_batches:
            for i, targets in enumerate(batch.targets):
                for box in targets.boxes:
                    assert colour_at(batch, i, box)[1] > 200
    assert stream.ledger.dropped == {("other", UNMAPPED): 4 * 4}


def test_a_picture_without_a_label_keeps_its_box_and_teaches_no_class(
    indexes: dict[str, Index], tmp_path: Path
) -> None:
    """As captions that name no category are stored in a source whose other captions do."""
    nameless = [UNLABELLED]
    captions = make_index(tmp_path, "extra", VOCABULARY, [[5], nameless, [3, UNLABELLED], []])
    uncut = {"crop_probability": 0.0, "extra_crop_probability": 0.0, "mosaic": False}
    data = some_data(transforms=SMALL.model_copy(update=uncut), repeat_threshold=0)
    stream = a_stream({**indexes, "extra": captions}, data, batch_size=4)
    expected = {1: ([1], 1.0), 2: ([-1], 0.0), 3: ([0, -1], 0.0), 4: ([], 1.0)}
    seen = set()
    for step in stream.iterate(1, 8):
        if step.stream == "extra":
            for batch in step.micro_batches:
                for targets, name in zip(batch.targets, batch.sample_ids, strict=True):
                    number = int(name.removeprefix("extra/")) + 1
                    assert (targets.labels.tolist(), targets.class_weight) == expected[number]
                    assert (targets.box_weight, targets.semantic_weight) == (1, 1)
                    seen.add(number)
    assert seen == set(expected)
    assert not stream.ledger.dropped, "nothing was left out"


def test_a_mosaic_with_a_part_without_a_label_teaches_no_class(
    indexes: dict[str, Index], tmp_path: Path
) -> None:
    captions = make_index(tmp_path, "extra", VOCABULARY, [[3], [5], [8], [3], [UNLABELLED]] * 3)
    uncut = {"crop_probability": 0.0, "extra_crop_probability": 0.0}
    data = some_data(transforms=SMALL.model_copy(update=uncut))
    weights = set()
    for step in a_stream({**indexes, "extra": captions}, data).iterate(0, 16):
        for batch in step.micro_batches:
            for targets in batch.targets:
                unlabelled = bool((targets.labels == -1).any())
                assert targets.class_weight == (0.0 if unlabelled else 1.0)
                weights.add((step.stream, targets.class_weight))
    assert weights == {("train", 1.0), ("extra", 0.0), ("extra", 1.0)}


def test_source_without_any_mapped_category_is_refused(
    indexes: dict[str, Index], tmp_path: Path
) -> None:
    alien = make_index(tmp_path, "alien", Vocabulary([Category(1, "zzz")]), [[]])
    data = some_data(train=[a_source("alien")], extra=[])
    with pytest.raises(RecipeError, match="source alien: none of its 1 categories"):
        a_stream({"alien": alien}, data)
