"""Images whose objects have the colour of their category, as indexes and streams."""

from collections.abc import Iterable
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data.batch import Batch
from pipeline.data.sample import UNLABELLED
from pipeline.data.shards.index import Index, write_index
from pipeline.data.shards.preparing import ShardTask, write_shard
from pipeline.data.sources import Record
from pipeline.data.stream.batches import StepBatches, Stream
from pipeline.data.vocabulary.categories import Category, Vocabulary
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
    return index_of(folder, name, vocabulary, records)


def index_of(folder: Path, name: str, vocabulary: Vocabulary, records: list[Record]) -> Index:
    """The same of records that are drawn already."""
    url = str(folder / name)
    infos = []
    for k in range(0, len(records), 3):
        part = records[k : k + 3]
        infos.append(write_shard(ShardTask(f"{url}/{k:06d}.tar", tuple(part), "inputs")))
    shards = [(info.shard, info.columns) for info in infos]
    return write_index(url, name, vocabulary, shards, inputs_digest="inputs", report={})


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
