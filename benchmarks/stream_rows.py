"""The rows of `benchmarks/stream.py`: who reads the same images, each in a process of its own."""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.batch import Batch, Targets, collate
from pipeline.data.images import decode_pixels
from pipeline.data.plan.draws import generator
from pipeline.data.plan.slot import Slot
from pipeline.data.shards.index import Index, load_index
from pipeline.data.stream.batches import Stream
from pipeline.data.transforms import as_picture, train_transform
from pipeline.recipe import Data, Training

MICRO_BATCH = 2
BATCH = 8
WARM = 0.25
"""Share of the time that is measured which is let pass before it."""


class Case(NamedTuple):
    """What a row reads, and for how long."""

    data: Data
    url: str
    """Of the shards of the only source."""
    workers: int
    seconds: float


class Example(NamedTuple):
    """One image as it goes into a batch."""

    image: Tensor
    targets: Targets


def transformed(data: bytes, boxes: np.ndarray, labels: np.ndarray, slot: Slot, case: Case) -> Any:
    """The work that all rows share: decoding and the recipe's own augmentation."""
    picture = as_picture(decode_pixels(data), boxes, labels)
    return train_transform(picture, case.data.transforms, generator(slot.seed), slot.shape_seed)


def example_of(data: bytes, tree: dict[str, Any], slot: Slot, case: Case) -> Example:
    """An example of an image and its json, as a member of a shard has it."""
    boxes = np.array(tree["boxes"], dtype=np.float32).reshape(-1, 4)
    labels = np.array(tree["category_ids"], dtype=np.int64)
    picture = transformed(data, boxes, labels, slot, case)
    size = tree["height"], tree["width"]
    boxes_of = picture.normalised_boxes()
    return Example(
        picture.image, Targets(boxes_of, picture.labels, tree["image_id"], picture.size, size)
    )


def batch_of(examples: Sequence[Example]) -> Batch:
    """A micro-batch, as ours are collated."""
    images, targets = zip(*examples, strict=True)
    return collate(images, targets, ["train"] * len(images), [""] * len(images))


def the_stream(case: Case, index: Index) -> Stream:
    """Our own stream of the case."""
    training = Training(steps=1 << 40, batch_size=BATCH, micro_batch=MICRO_BATCH)
    return Stream(case.data, training, {"train": index}, index.vocabulary, seed=0)


def slots_of(case: Case) -> Iterator[Slot]:
    """The order of our stream: what it and the first and third row read."""
    plan = the_stream(case, load_index(case.url)).plan
    return (slot for step in count() for slot in plan.batch(step))


def cpu_seconds() -> float:
    """Of this process and all below it that live."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measured(images: Iterator[int], seconds: float) -> dict[str, float]:
    """Images a second, and CPU seconds of an image, of an iterator of numbers of images."""
    begun = time.perf_counter()
    first = next(images)
    first_after = time.perf_counter() - begun
    until = time.perf_counter() + WARM * seconds
    while time.perf_counter() < until:
        next(images)
    number, cpu, begun = 0, cpu_seconds(), time.perf_counter()
    while time.perf_counter() < begun + seconds:
        number += next(images)
    taken, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    assert first
    return {"rate": number / taken, "cpu": cpu / number, "first": first_after}


def _decode_always(case: Case, worker: int, done: Any) -> None:
    torch.set_num_threads(1)
    index = load_index(case.url)
    samples = [index.read(i) for i in range(index.num_samples)]
    for number, slot in enumerate(slots_of(case)):
        if number // MICRO_BATCH % case.workers == worker:
            sample = samples[slot.index]
            transformed(sample.image, sample.boxes, sample.category_ids, slot, case)
            done.value += 1


def alone(case: Case) -> dict[str, float]:
    """(a) Decoding and augmentation of images that are in memory, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    done = [context.Value("q", 0, lock=False) for _ in range(case.workers)]
    processes = [
        context.Process(target=_decode_always, args=(case, worker, done[worker]), daemon=True)
        for worker in range(case.workers)
    ]
    for process in processes:
        process.start()

    def images() -> Iterator[int]:
        seen = 0
        while True:
            time.sleep(0.05)
            now = sum(each.value for each in done)
            if all(each.value for each in done):
                yield now - seen
                seen = now

    result = measured(images(), case.seconds)
    for process in processes:
        process.kill()
    return result


def ours(case: Case, start: int = 0) -> dict[str, float]:
    """(b) Our stream."""
    stream = the_stream(case, load_index(case.url))
    steps = stream.iterate(start, 1 << 40)
    return measured((BATCH for _ in steps), case.seconds)


class Files(Dataset[Example]):
    """Image files with their annotations in memory, by slot."""

    def __init__(self, case: Case) -> None:
        self.case = case
        root = Path(case.data.root)
        tree = json.loads((root / "annotations.json").read_text())
        self.images = {image["id"]: image for image in tree["images"]}
        self.trees: dict[int, dict[str, Any]] = {}
        for image in tree["images"]:
            size = {key: image[key] for key in ("height", "width")}
            self.trees[image["id"]] = {"boxes": [], "category_ids": [], "image_id": image["id"]}
            self.trees[image["id"]] |= size
        for annotation in tree["annotations"]:
            x, y, width, height = annotation["bbox"]
            own = self.trees[annotation["image_id"]]
            own["boxes"].append([x, y, x + width, y + height])
            own["category_ids"].append(annotation["category_id"])
        self.ids = load_index(case.url).image_id.tolist()

    def __getitem__(self, slot: Slot) -> Example:
        image_id = self.ids[slot.index]
        path = Path(self.case.data.root) / "images" / self.images[image_id]["file_name"]
        return example_of(path.read_bytes(), self.trees[image_id], slot, self.case)


def files(case: Case) -> dict[str, float]:
    """(c) torch's DataLoader over the files."""
    loader = DataLoader(
        Files(case),
        batch_size=MICRO_BATCH,
        sampler=slots_of(case),
        collate_fn=batch_of,
        num_workers=case.workers,
    )
    return measured((len(batch.targets) for batch in loader), case.seconds)


class _Member:
    """Turns a sample of webdataset into an example."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.number = 0

    def __call__(self, member: dict[str, Any]) -> Example:
        self.number += 1
        seed = int.from_bytes(f"{self.number} {member['__key__']}".encode()[:7], "little")
        slot = Slot("train", "train", 0, 0, seed)
        return example_of(member["jpg"], json.loads(member["json"]), slot, self.case)


def webdataset(case: Case) -> dict[str, float]:
    """(d) webdataset's own pipeline over the same shards."""
    import webdataset as wds

    urls = [f"{case.url}/{shard.file}" for shard in load_index(case.url).shards]
    pipeline = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
        .repeat()
        .shuffle(1000)
        .map(_Member(case))
        .batched(MICRO_BATCH, collation_fn=batch_of)
    )
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=case.workers)
    return measured((len(batch.targets) for batch in loader), case.seconds)


def write_mds(case: Case, folder: Path) -> None:
    """The same images for mosaicml-streaming."""
    from streaming import MDSWriter

    index = load_index(case.url)
    columns = {"jpg": "bytes", "json": "json"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for i in range(index.num_samples):
            sample = index.read(i)
            tree = {
                "boxes": sample.boxes.tolist(),
                "category_ids": sample.category_ids.tolist(),
                "image_id": sample.image_id,
                "height": sample.height,
                "width": sample.width,
            }
            writer.write({"jpg": sample.image, "json": tree})


def mosaicml(case: Case) -> dict[str, float]:
    """(e) mosaicml-streaming over its own shards of the same images."""
    from streaming import StreamingDataset

    folder = Path(case.data.root) / "mds"
    if not folder.exists():
        write_mds(case, folder)

    class Streamed(StreamingDataset):
        def __getitem__(self, number: int) -> Example:
            found = super().__getitem__(number)
            slot = Slot("train", "train", 0, 0, number * 7919)
            return example_of(found["jpg"], found["json"], slot, case)

    dataset = Streamed(local=str(folder), shuffle=True, batch_size=MICRO_BATCH)
    loader = DataLoader(
        dataset, batch_size=MICRO_BATCH, collate_fn=batch_of, num_workers=case.workers
    )
    return measured((len(batch.targets) for _ in count() for batch in loader), case.seconds)


ROWS: dict[str, Callable[[Case], dict[str, float]]] = {
    "alone": alone,
    "stream": ours,
    "files": files,
    "webdataset": webdataset,
    "mosaicml": mosaicml,
}
