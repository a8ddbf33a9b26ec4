"""From shards to batches: the same bytes for every world size and worker count, and faults."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import reader as reader_module
from pipeline.data.batch import Batch
from pipeline.data.images import decode_image
from pipeline.data.index import Index, write_index
from pipeline.data.reader import UNMAPPED
from pipeline.data.sample import UNLABELLED
from pipeline.data.shards import ShardTask, write_shard
from pipeline.data.sources import Record
from pipeline.data.stream import EvaluationSet, StepBatches, Stream
from pipeline.data.vocabulary import Category, Vocabulary
from pipeline.errors import DataError, LongtailError, RecipeError, StorageError
from pipeline.recipe import Data, Source, Training, Transforms

COLOURS = {
    3: (250, 0, 0),
    5: (0, 250, 0),
    8: (0, 0, 250),
    99: (250, 250, 0),
    UNLABELLED: (0, 250, 250),
}
NAMES = {3: "apple", 5: "leaf", 8: "sky", 99: "lemon"}
VOCABULARY = Vocabulary([Category(number, NAMES[number]) for number in (3, 5, 8)])
SMALL = Transforms(
    short_sides=[48, 64],
    max_side=96,
    crop_short_sides=[48],
    crop_sizes=(30, 48),
    mosaic_cell=32,
    evaluation_short_side=64,
    evaluation_max_side=128,
)


def draw_record(
    folder: Path, name: str, image_id: int, objects: list[int], rng: np.random.Generator
) -> Record:
    """Grey noise with a rectangle in the colour of each object's category, or all over it."""
    height, width = (int(side) for side in rng.integers(40, 80, size=2))
    pixels = rng.integers(60, 70, size=(height, width, 3), dtype=np.uint8)
    boxes = []
    for k, category in enumerate(objects):
        left = k * width // len(objects)
        right = (k + 1) * width // len(objects) - 2
        top, bottom = int(rng.integers(0, 15)), int(rng.integers(25, 40))
        if name == "extra":
            left, top, right, bottom = 0, 0, width, height
        pixels[top:bottom, left:right] = COLOURS[category]
        boxes.append((left, top, right, bottom))
    path = folder / f"{name}{image_id}.png"
    Image.fromarray(pixels).save(path)
    return Record(
        key=f"{image_id:06d}",
        path=str(path),
        image_id=image_id,
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        category_ids=np.array(objects, dtype=np.int64),
        negative_category_ids=(8, 3, 77) if name == "train" else (),
        not_exhaustive_category_ids=(5,) if name == "train" else (),
        coarse=name == "extra",
    )


def make_index(folder: Path, name: str, vocabulary: Vocabulary, objects: list[list[int]]) -> Index:
    """Shards of three samples each."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    rng = np.random.default_rng(list(name.encode()))
    records = [draw_record(images, name, i, own, rng) for i, own in enumerate(objects)]
    url = str(folder / name)
    infos = []
    for k in range(0, len(records), 3):
        part = records[k : k + 3]
        infos.append(write_shard(ShardTask(f"{url}/{k:06d}.tar", tuple(part), "inputs")))
    shards = [(info.shard, info.columns) for info in infos]
    return write_index(url, name, vocabulary, shards, inputs_digest="inputs", report={})


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Index]:
    folder = tmp_path_factory.mktemp("world")
    objects = [[3], [5, 8], [], [3, 5, 8], [8], [5], [3, 3], [], [8, 5], [3], [5]]
    whole = [[UNLABELLED], [UNLABELLED, UNLABELLED], [UNLABELLED], [], [UNLABELLED]]
    return {
        "train": make_index(folder, "train", VOCABULARY, objects),
        "extra": make_index(folder, "extra", VOCABULARY, [[3], [5], [8], [3], [5], [8], [3]]),
        "plain": make_index(folder, "plain", Vocabulary([]), whole),
        "validation": make_index(folder, "validation", VOCABULARY, objects),
    }


def a_source(name: str, **given: object) -> Source:
    return Source.model_validate(
        {"name": name, "format": "lvis", "images": "i", "annotations": "a", **given}
    )


def some_data(**given: object) -> Data:
    settings = {
        "root": "unused",
        "train": [a_source("train")],
        "extra": [a_source("extra")],
        "validation": a_source("validation"),
        "repeat_threshold": 0.5,
        "workers": 0,
        "transforms": SMALL,
    }
    return Data.model_validate({**settings, **given})


def a_stream(
    indexes: dict[str, Index],
    data: Data,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 6,
    micro_batch: int = 2,
) -> Stream:
    training = Training(steps=100, batch_size=batch_size, micro_batch=micro_batch)
    return Stream(data, training, indexes, VOCABULARY, seed=3, rank=rank, world_size=world_size)


def fingerprints(steps: list[StepBatches]) -> list[tuple[int, str, str]]:
    """(step, sample id, hash of its pixels and targets) of every slot that counts, in order."""
    found = []
    for step in steps:
        for batch in step.micro_batches:
            for image, target, sample_id in zip(
                batch.images, batch.targets, batch.sample_ids, strict=True
            ):
                if target.box_weight == 0:
                    continue
                height, width = target.size
                content = sha256(image[:, :height, :width].contiguous().numpy().tobytes())
                content.update(target.boxes.numpy().tobytes() + target.labels.numpy().tobytes())
                content.update(repr((target.seed, target.image_id, target.size)).encode())
                found.append((step.step, sample_id, content.hexdigest()))
    return found


def joined(parts: Iterable[list[tuple[int, str, str]]]) -> list[tuple[int, str, str]]:
    return list(chain.from_iterable(parts))


def colour_at(batch: Batch, image: int, box: torch.Tensor) -> list[int]:
    height, width = batch.targets[image].size
    x, y = int(box[0] * width), int(box[1] * height)
    return batch.images[image, :, y, x].tolist()


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


@pytest.mark.parametrize("mode", ["alternate", "mixed"])
def test_same_bytes_for_every_world_size_and_start(indexes: dict[str, Index], mode: str) -> None:
    data = some_data(extra_mode=mode)
    reference = fingerprints(list(a_stream(indexes, data).iterate(0, 8)))
    assert len(reference) == 8 * 6
    assert len({content for _, _, content in reference}) == len(reference)
    for world_size in (2, 3, 4, 7):
        ranks = [
            list(a_stream(indexes, data, rank, world_size).iterate(3, 8))
            for rank in range(world_size)
        ]
        shapes = {tuple(len(b.targets) for s in steps for b in s.micro_batches) for steps in ranks}
        assert len(shapes) == 1
        together = joined(fingerprints(steps) for steps in ranks)
        assert sorted(together) == sorted(entry for entry in reference if entry[0] >= 3)
        by_step = [joined(fingerprints([steps[k]]) for steps in ranks) for k in range(5)]
        assert joined(by_step) == [entry for entry in reference if entry[0] >= 3]


def test_same_bytes_from_worker_processes_and_errors_arrive_as_they_are(
    indexes: dict[str, Index], tmp_path: Path
) -> None:
    reference = fingerprints(list(a_stream(indexes, some_data()).iterate(2, 8)))
    stream = a_stream(indexes, some_data(workers=2))
    assert fingerprints(list(stream.iterate(2, 8))) == reference
    broken = make_index(tmp_path, "train", VOCABULARY, [[3]] * 3)
    Path(broken.shard_url(0)).write_bytes(b"")
    stream = a_stream({**indexes, "train": broken}, some_data(workers=1, extra=[]))
    with pytest.raises(StorageError, match=r"^(?!Caught).*000000\.tar"):
        next(stream.iterate(0, 1))


def test_padding_weighs_nothing_and_repeats_a_sample(indexes: dict[str, Index]) -> None:
    data = some_data(extra=[])
    last = list(a_stream(indexes, data, rank=0, world_size=4, batch_size=5).iterate(0, 3))
    for step in last:
        targets = [target for batch in step.micro_batches for target in batch.targets]
        assert len(targets) == 2
        real, padding = targets
        assert (real.class_weight, real.box_weight, real.semantic_weight) == (1, 1, 1)
        assert (padding.class_weight, padding.box_weight, padding.semantic_weight) == (0, 0, 0)
        assert torch.equal(real.boxes, padding.boxes)
        assert step.sources == {"train": 5}


def test_sources_and_streams_of_steps(indexes: dict[str, Index]) -> None:
    extra = [a_source("extra"), a_source("plain", use_labels=False, weight=0.5)]
    steps = list(a_stream(indexes, some_data(extra=extra, extra_ratio=2.0)).iterate(0, 6))
    assert [step.stream for step in steps] == ["train", "extra", "extra"] * 2
    assert steps[1].sources == {"extra": 4, "plain": 2}
    for step in steps:
        names = [name for batch in step.micro_batches for name in batch.source]
        assert {name: names.count(name) for name in step.sources} == step.sources
    mixed = list(a_stream(indexes, some_data(extra_mode="mixed")).iterate(0, 4))
    assert all(step.sources == {"train": 3, "extra": 3} for step in mixed)


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


def test_source_without_any_mapped_category_is_refused(
    indexes: dict[str, Index], tmp_path: Path
) -> None:
    alien = make_index(tmp_path, "alien", Vocabulary([Category(1, "zzz")]), [[]])
    data = some_data(train=[a_source("alien")], extra=[])
    with pytest.raises(RecipeError, match="source alien: none of its 1 categories"):
        a_stream({"alien": alien}, data)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[bytes]:
    """Encoded images that the decoder refuses, as a decoder of another version might."""
    refused: set[bytes] = set()

    def decode(data: bytes) -> Image.Image:
        if data in refused:
            raise DataError("damaged")
        return decode_image(data)

    monkeypatch.setattr(reader_module, "decode_image", decode)
    return refused


def test_unreadable_image_has_the_same_substitute_on_every_rank(
    indexes: dict[str, Index], unreadable: set[bytes]
) -> None:
    data = some_data()
    good = fingerprints(list(a_stream(indexes, data).iterate(0, 10)))
    unreadable.add(indexes["train"].read(4).image)
    stream = a_stream(indexes, data)
    reference = fingerprints(list(stream.iterate(0, 10)))
    assert stream.ledger.unreadable == {"train/000004": "damaged"}
    changed = [new for new, old in zip(reference, good, strict=True) if new != old]
    assert len(changed) == sum(sample_id == "train/000004" for _, sample_id, _ in good) > 0
    # From the same shard, which holds the samples 3, 4 and 5.
    assert {sample_id for _, sample_id, _ in changed} <= {"train/000003", "train/000005"}
    ranks = [list(a_stream(indexes, data, rank, 2).iterate(0, 10)) for rank in range(2)]
    together = joined(fingerprints(steps) for steps in ranks)
    assert sorted(together) == sorted(reference)


def test_unreadable_images_beyond_the_budget_stop_the_run(
    indexes: dict[str, Index], unreadable: set[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    unreadable.update(indexes["train"].read(i).image for i in (0, 4, 8))
    stream = a_stream(indexes, some_data(bad_sample_budget=3))
    with caplog.at_level(logging.WARNING):
        for _ in stream.iterate(0, 12):
            pass
    assert sorted(stream.ledger.unreadable) == [f"train/00000{i}" for i in (0, 4, 8)]
    assert caplog.text.count("another sample takes its place") == 3
    stream = a_stream(indexes, some_data(bad_sample_budget=2))
    with pytest.raises(DataError, match=r"source train: 3 images .*bad_sample_budget 2"):
        for _ in stream.iterate(0, 12):
            pass


def test_shard_of_nothing_readable_is_given_up(
    indexes: dict[str, Index], unreadable: set[bytes]
) -> None:
    unreadable.update(indexes["train"].read(i).image for i in range(11))
    with pytest.raises(DataError, match=r"source train: .* unreadable images in a row"):
        next(a_stream(indexes, some_data()).iterate(0, 1))


def test_image_of_another_size_than_its_annotation_is_unreadable(
    indexes: dict[str, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = Image.new("RGB", (500, 400))
    wrong = indexes["train"].read(4).image
    monkeypatch.setattr(
        reader_module, "decode_image", lambda data: larger if data == wrong else decode_image(data)
    )
    stream = a_stream(indexes, some_data())
    for _ in stream.iterate(0, 10):
        pass
    assert "500x400" in stream.ledger.unreadable["train/000004"]


def test_damaged_shard_is_never_substituted(indexes: dict[str, Index], tmp_path: Path) -> None:
    broken = make_index(tmp_path, "train", VOCABULARY, [[3]] * 6)
    shard = Path(broken.shard_url(1))
    shard.write_bytes(shard.read_bytes()[:700])
    stream = a_stream({**indexes, "train": broken}, some_data(extra=[]))
    with pytest.raises(StorageError, match=r"000003\.tar"):
        for _ in stream.iterate(0, 3):
            pass


def test_leaving_the_stream_early_ends_its_thread(indexes: dict[str, Index]) -> None:
    stream = a_stream(indexes, some_data())
    steps = stream.iterate(0, 100)
    next(steps)
    assert any(thread.name.startswith("reader") for thread in threading.enumerate())
    steps.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())
    assert list(stream.iterate(5, 5)) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_visits_every_image_once(
    indexes: dict[str, Index], world_size: int, batch_size: int
) -> None:
    evaluation = EvaluationSet(some_data(), indexes["validation"], VOCABULARY)
    assert evaluation.num_images == 11
    seen = []
    for rank in range(world_size):
        for batch in evaluation.iterate(batch_size, rank, world_size):
            assert 1 <= len(batch.targets) <= batch_size
            for i, targets in enumerate(batch.targets):
                sample = indexes["validation"].read(targets.image_id)
                assert targets.original_size == (sample.height, sample.width)
                assert min(targets.size) == 64 or max(targets.size) == 128
                assert len(targets.boxes) == len(sample.boxes)
                for box, label in zip(targets.boxes, targets.labels, strict=True):
                    expected = COLOURS[VOCABULARY.ids[int(label)]]
                    assert np.abs(np.subtract(colour_at(batch, i, box), expected)).max() < 10
                seen.append(targets.image_id)
    assert seen == list(range(11))


def test_evaluation_needs_every_image(indexes: dict[str, Index], unreadable: set[bytes]) -> None:
    unreadable.add(indexes["validation"].read(3).image)
    evaluation = EvaluationSet(some_data(), indexes["validation"], VOCABULARY)
    batches = evaluation.iterate(2)
    assert len(list(islice(batches, 1))) == 1
    with pytest.raises(LongtailError, match="validation/000003: damaged"):
        list(batches)


@pytest.mark.slow
def test_readers_end_when_the_training_process_is_killed(indexes: dict[str, Index]) -> None:
    program = (
        "import multiprocessing, sys, time\n"
        "from pipeline.data.index import load_index\n"
        "from pipeline.data.stream import EvaluationSet\n"
        "from pipeline.recipe import Data\n"
        "if __name__ == '__main__':\n"
        "    index = load_index(sys.argv[1])\n"
        "    data = Data.model_validate_json(sys.argv[2])\n"
        "    batches = EvaluationSet(data, index, index.vocabulary).iterate(1)\n"
        "    next(batches)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(600)\n"
    )
    data = some_data(workers=2).model_dump_json()
    command = [sys.executable, "-c", program, indexes["validation"].url, data]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        readers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(readers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in readers):
        assert time.monotonic() < deadline, f"readers {readers} outlive their process"
        time.sleep(0.1)
