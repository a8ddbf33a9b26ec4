"""Tiny raw data sets in the published forms, for the tests of sources and shards."""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from pipeline.recipe import Data, Source

A = TypeVar("A")
R = TypeVar("R")

LVIS = Source(name="lvis_train", format="lvis", images="lvis", annotations="lvis.json")
OBJECTS365 = Source(
    name="objects365", format="objects365", images="objects365", annotations="objects365.json"
)
IMAGENET = Source(
    name="imagenet", format="imagenet21k", images="imagenet", annotations="imagenet/wnids.tsv"
)
CC3M = Source(name="cc3m", format="cc3m", images="cc3m", annotations="captions.tsv")


def photograph(seed: int = 0, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """An encoded JPEG of noise, (width, height)."""
    colours = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(colours).save(buffer, str(options.pop("format", "JPEG")), **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str | object) -> None:
    """Bytes and text as they are, anything else as json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tar_of(files: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content), in this order."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return buffer.getvalue()


def lvis_tree(num_images: int = 3) -> dict[str, list[dict]]:
    """Image k (id 10 + k, 40x30) has k boxes, of categories 3 and 8 in turn."""
    tree: dict[str, list[dict]] = {
        "categories": [
            {"id": 8, "name": "bow_(weapon)", "synset": "bow.n.04", "frequency": "r"},
            {"id": 3, "name": "aerosol_can", "synset": "aerosol.n.02", "frequency": "c",
             "image_count": 64, "instance_count": 109, "synonyms": ["aerosol_can", "spray_can"]},
        ],
        "images": [],
        "annotations": [],
    }  # fmt: skip
    for k in range(num_images):
        tree["images"].append(
            {
                "id": 10 + k,
                "width": 40,
                "height": 30,
                "coco_url": f"http://images.cocodataset.org/train2017/{10 + k:012d}.jpg",
                "neg_category_ids": [8] if k == 0 else [],
                "not_exhaustive_category_ids": [3] if k == 1 else [],
            }
        )
        for j in range(k):
            tree["annotations"].append(
                {
                    "id": 100 * k + j,
                    "image_id": 10 + k,
                    "category_id": (3, 8)[j % 2],
                    "bbox": [1.25 + j % 20, 2.5, 10.1, 8],
                }
            )
    return tree


def write_lvis(root: Path, tree: dict[str, list[dict]] | None = None, num_images: int = 3) -> None:
    tree = tree or lvis_tree(num_images)
    write(root / "lvis.json", tree)
    for image in tree["images"]:
        path = root / "lvis" / "train2017" / f"{image['id']:012d}.jpg"
        write(path, photograph(image["id"]))


def data_of(root: Path | str, *sources: Source, **options: object) -> Data:
    """A data section over these sources; captions cannot give the vocabulary, so LVIS leads."""
    train = [source for source in sources if source.format != "cc3m"] or [LVIS]
    extra = [source for source in sources if source.format == "cc3m"]
    return Data.model_validate({"root": str(root), "train": train, "extra": extra, **options})


def in_line(function: Callable[[A], R], arguments: Sequence[A]) -> Iterator[tuple[int, R]]:
    """`run_tasks` without processes, last task first, since no order is promised."""
    for position in reversed(range(len(arguments))):
        yield position, function(arguments[position])
