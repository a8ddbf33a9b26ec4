"""A small long-tail world, drawn and written to disk in the formats of the published data sets.

A category is a pattern, a colour and a shape ("striped teal ring"), so captions over all
compositions teach a small CLIP about categories that the detector hardly ever sees.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.miniature.drawing import (
    COMPOSITIONS,
    GROUNDS,
    Canvas,
    Composition,
    Placed,
    draw_scene,
)
from pipeline.data.miniature.sizes import WORLDS, World
from pipeline.data.shards.preparing import Argument, Result, RunTasks
from pipeline.errors import RecipeError

Size = Literal["tiny", "quickstart", "benchmark"]
MARKER = "miniature.json"
_CHUNK_IMAGES = 250
_JPEG_QUALITY = 90
_OBJECTS_PER_IMAGE = (2, 3, 4, 4, 5, 6)
_BOXES_PER_OBJECTS365_IMAGE = (3, 4, 5, 5, 6, 7)
_SECOND_INSTANCE = 0.15
_LEFT_OUT = 0.2
"""Chance that a second instance stays without annotation: the image is then not exhaustive."""
_NEGATIVES = 8
_VALIDATION_FROM_TRAIN2017 = 10
"""Every so many validation images lie in train2017, as those of LVIS v1 partly do."""
_OPENERS = ("a photo of ", "a picture of ", "a view of ", "a close-up of ")
_JOINERS = (" beside ", " next to ", " and ")
_DEFINITIONS = {
    "solid": "without a pattern",
    "striped": "with parallel stripes",
    "dotted": "with round dots",
    "checkered": "with alternating squares",
}


@dataclass(frozen=True, slots=True)
class _Picture:
    """One image to draw: `path` is relative to the world's root."""

    path: str
    canvas: Canvas
    objects: tuple[Composition, ...]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive pictures of one part; picture i is drawn from (seed, part, first + i) alone."""

    root: str
    seed: int
    part: int
    first: int
    pictures: tuple[_Picture, ...]


@dataclass(slots=True)
class _Scene:
    """A planned LVIS image: columns of its objects, and which of them stay without annotation."""

    columns: list[int]
    left_out: list[bool]
    negatives: list[int]


def draw_world(root: str | Path, size: Size, seed: int, run_tasks: RunTasks | None = None) -> None:
    """Write the raw data of a miniature world under `root`, unless it is there already.

    `run_tasks(function, arguments)` gives (position, result) of each argument in any order; the
    default draws in line. Raises `RecipeError` where `root` holds another world.
    """
    root = Path(root)
    world = WORLDS[size]
    marker: dict[str, object] = {"size": size, "seed": seed, "version": world.version}
    if _is_drawn(root, marker):
        return
    run: RunTasks = run_tasks or _in_line
    compositions = _compositions(seed)
    lvis, others = _vocabularies(world, compositions)
    categories = _draw_lvis(root, world, seed, lvis, run)
    _draw_objects365(root, world, seed, others, run)
    _draw_imagenet(root, world, seed, categories, run)
    _draw_captions(root, world, seed, compositions, run)
    _write_json(root / MARKER, marker)


def _is_drawn(root: Path, marker: dict[str, object]) -> bool:
    path = root / MARKER
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != marker:
        raise RecipeError(
            f"{root} holds the miniature world {found}, the recipe asks for {marker}; give another "
            "data.root, or delete that folder"
        )
    return True


def _in_line(
    function: Callable[[Argument], Result], arguments: Sequence[Argument], /
) -> Iterator[tuple[int, Result]]:
    yield from ((position, function(argument)) for position, argument in enumerate(arguments))


def _compositions(seed: int) -> list[Composition]:
    """All compositions in an order of the seed: LVIS takes the first, Objects365 the next."""
    order = np.random.default_rng([seed, 0]).permutation(len(COMPOSITIONS))
    return [COMPOSITIONS[i] for i in order]


def _vocabularies(
    world: World, compositions: Sequence[Composition]
) -> tuple[list[Composition], list[Composition]]:
    """LVIS's categories by name, and those of Objects365, which LVIS has not."""
    num_lvis = sum(band.categories for band in world.train)
    num_rare = world.train[-1].categories if world.rare_shapes else 0
    rare = [c for c in compositions if c.shape in world.rare_shapes][:num_rare]
    rest = [c for c in compositions if c.shape not in world.rare_shapes]
    num_rest = num_lvis - num_rare
    others = rest[num_rest : num_rest + world.objects365.categories]
    return sorted(rest[:num_rest] + rare), others


def _draw_lvis(
    root: Path, world: World, seed: int, lvis: Sequence[Composition], run: RunTasks
) -> list[dict[str, object]]:
    """Draw both splits of LVIS and give the categories with the counts of the train split."""
    rng = np.random.default_rng([seed, 1])
    rare = np.array([composition.shape in world.rare_shapes for composition in lvis])
    rank = np.empty(len(lvis), np.int64)
    rank[~rare] = rng.permutation(int((~rare).sum()))
    rank[rare] = int((~rare).sum()) + rng.permutation(int(rare.sum()))
    documents = []
    for part, bands in ((1, world.train), (2, world.validation)):
        counts = np.array([count for band in bands for count in band.counts()])[rank]
        scenes = _plan_scenes(rng, counts, lvis)
        first_id = 1 if part == 1 else 500_001
        folders = [
            "train2017" if part == 1 or i % _VALIDATION_FROM_TRAIN2017 == 9 else "val2017"
            for i in range(len(scenes))
        ]
        tails = [f"{folder}/{first_id + i:012d}.jpg" for i, folder in enumerate(folders)]
        pictures = [
            _Picture(
                f"lvis/{tail}",
                _canvas(rng, (112, 160), (20, 70)),
                tuple(lvis[column] for column in scene.columns),
            )
            for tail, scene in zip(tails, scenes, strict=True)
        ]
        placed = _draw(root, seed, part, pictures, run)
        images = [
            {
                "id": first_id + i,
                "width": picture.canvas.width,
                "height": picture.canvas.height,
                "coco_url": f"http://images.cocodataset.org/{tail}",
                "neg_category_ids": [column + 1 for column in scene.negatives],
                "not_exhaustive_category_ids": sorted(
                    {c + 1 for c, out in zip(scene.columns, scene.left_out, strict=True) if out}
                ),
            }
            for i, (tail, scene, picture) in enumerate(zip(tails, scenes, pictures, strict=True))
        ]
        documents.append((images, _lvis_annotations(first_id, scenes, placed)))
    categories = _lvis_categories(lvis, documents[0][1])
    for split, (images, annotations) in zip(("train", "val"), documents, strict=True):
        _write_json(
            root / f"annotations/lvis_v1_{split}.json",
            {
                "info": {"description": f"miniature long-tail world, LVIS v1 form, {split}"},
                "licenses": [],
                "categories": categories,
                "images": images,
                "annotations": annotations,
            },
        )
    return categories


def _plan_scenes(
    rng: np.random.Generator, counts: NDArray[np.int64], lvis: Sequence[Composition]
) -> list[_Scene]:
    scenes = []
    for columns in _assign(rng, counts, _OBJECTS_PER_IMAGE):
        objects = [(column, False) for column in columns]
        for column in columns:
            if rng.random() < _SECOND_INSTANCE:
                objects.append((column, bool(rng.random() < _LEFT_OUT)))
        objects = [objects[i] for i in rng.permutation(len(objects))]
        negatives = _negatives(rng, columns, lvis)
        scenes.append(_Scene([c for c, _ in objects], [out for _, out in objects], negatives))
    return scenes


def _assign(
    rng: np.random.Generator, counts: NDArray[np.int64], objects_per_image: Sequence[int]
) -> list[list[int]]:
    """Columns of each image, column c on exactly `counts[c]` of them and once on each."""
    num_images = max(round(counts.sum() / np.mean(objects_per_image)), int(counts.max()))
    room = rng.permutation(np.resize(objects_per_image, num_images)).astype(float)
    images: list[list[int]] = [[] for _ in range(num_images)]
    for column in np.argsort(-counts, kind="stable"):
        order = np.argsort(-(room + 2 * rng.random(num_images)), kind="stable")
        for image in order[: counts[column]]:
            images[image].append(int(column))
            room[image] -= 1
    return images


def _negatives(
    rng: np.random.Generator, positives: Sequence[int], lvis: Sequence[Composition]
) -> list[int]:
    """Columns verified absent; those that differ from a positive in one word are likelier."""
    absent = [column for column in range(len(lvis)) if column not in positives]
    weights = np.array(
        [
            1.0 + 3.0 * sum(_words_shared(lvis[column], lvis[p]) == 2 for p in positives)
            for column in absent
        ]
    )
    size = min(_NEGATIVES, len(absent))
    chosen = rng.choice(len(absent), size=size, replace=False, p=weights / weights.sum())
    return sorted(absent[i] for i in chosen)


def _words_shared(one: Composition, other: Composition) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


def _lvis_annotations(
    first_id: int, scenes: Sequence[_Scene], placed: Sequence[Sequence[Placed]]
) -> list[dict[str, object]]:
    annotations: list[dict[str, object]] = []
    for i, (scene, drawn) in enumerate(zip(scenes, placed, strict=True)):
        for column, left_out, (box, area) in zip(scene.columns, scene.left_out, drawn, strict=True):
            if left_out:
                continue
            x0, y0, x1, y1 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": first_id + i,
                    "category_id": column + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": area,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
    return annotations


def _lvis_categories(
    lvis: Sequence[Composition], annotations: Sequence[dict[str, object]]
) -> list[dict[str, object]]:
    """Categories with counts of the train split, and the frequency that LVIS v1 derives from it."""
    categories: list[dict[str, object]] = []
    for column, composition in enumerate(lvis):
        own = [a for a in annotations if a["category_id"] == column + 1]
        image_count = len({a["image_id"] for a in own})
        name = composition.name.replace(" ", "_")
        pattern, colour, shape = composition
        categories.append(
            {
                "id": column + 1,
                "name": name,
                "synset": f"{name}.n.01",
                "synonyms": [name, f"{colour}_{pattern}_{shape}"],
                "def": f"a {colour} {shape} {_DEFINITIONS[pattern]}",
                "image_count": image_count,
                "instance_count": len(own),
                "frequency": "r" if image_count <= 10 else "c" if image_count <= 100 else "f",
            }
        )
    return categories


def _draw_objects365(
    root: Path, world: World, seed: int, others: Sequence[Composition], run: RunTasks
) -> None:
    rng = np.random.default_rng([seed, 3])
    counts = np.array(world.objects365.counts())
    scenes = _assign(rng, counts, _BOXES_PER_OBJECTS365_IMAGE)
    names = [f"images/v1/patch{i % 4}/objects365_v1_{i:08d}.jpg" for i in range(len(scenes))]
    pictures = [
        _Picture(
            f"objects365/{name}",
            _canvas(rng, (112, 160), (20, 70)),
            tuple(others[column] for column in columns),
        )
        for name, columns in zip(names, scenes, strict=True)
    ]
    placed = _draw(root, seed, 3, pictures, run)
    annotations: list[dict[str, object]] = []
    for i, (columns, drawn) in enumerate(zip(scenes, placed, strict=True)):
        for column, ((x0, y0, x1, y1), area) in zip(columns, drawn, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": column + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": area,
                    "iscrowd": 0,
                    "isfake": 0,
                    "isreflected": 0,
                }
            )
    images = [
        {"id": i + 1, "file_name": name, "width": p.canvas.width, "height": p.canvas.height}
        for i, (name, p) in enumerate(zip(names, pictures, strict=True))
    ]
    categories = [{"id": i + 1, "name": other.name.title()} for i, other in enumerate(others)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    _write_json(root / "objects365/zhiyuan_objv2_train.json", document)


def _draw_imagenet(
    root: Path, world: World, seed: int, categories: Sequence[dict[str, object]], run: RunTasks
) -> None:
    """One folder of single-object images for every rare category and for some common ones."""
    rng = np.random.default_rng([seed, 4])
    common = [category for category in categories if category["frequency"] == "c"]
    kept = [common[i] for i in rng.permutation(len(common))[: world.imagenet_common]]
    chosen = [c for c in categories if c["frequency"] == "r" or c in kept]
    rows = ["\t".join(("wnid", "lvis_v1_id", "lvis_name", "lvis_synset", "lvis_frequency"))]
    pictures = []
    for category in chosen:
        wnid = f"n9{category['id']:07d}"
        keys = ("id", "name", "synset", "frequency")
        rows.append("\t".join([wnid, *(str(category[key]) for key in keys)]))
        pattern, colour, shape = str(category["name"]).split("_")
        for k in range(int(rng.integers(*world.imagenet_images, endpoint=True))):
            canvas = _canvas(rng, (96, 144), (0, 0))
            side = min(canvas.width, canvas.height)
            low, high = world.imagenet_sizes
            canvas = canvas._replace(sizes=(low * side, high * side))
            path = f"imagenet21k/{wnid}/{wnid}_{k + 1}.JPEG"
            pictures.append(_Picture(path, canvas, (Composition(pattern, colour, shape),)))
    _draw(root, seed, 4, pictures, run)
    table = root / "imagenet21k/wnid_to_lvis.tsv"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _draw_captions(
    root: Path, world: World, seed: int, every: Sequence[Composition], run: RunTasks
) -> None:
    rng = np.random.default_rng([seed, 5])
    rows, pictures = [], []
    for i in range(world.captions):
        number = 1 if rng.random() < 0.7 else 2
        objects = tuple(every[int(j)] for j in rng.integers(len(every), size=number))
        canvas = _canvas(rng, (64, 80), (50, 76) if number == 1 else (30, 48))
        opener = str(rng.choice(_OPENERS)) if rng.random() < 0.3 else ""
        place = f" on {canvas.ground}" if rng.random() < 0.5 else ""
        joiner = str(rng.choice(_JOINERS))
        things = joiner.join(f"a {composition.name}" for composition in objects)
        rows.append(f"{opener}{things}{place}\thttp://images.example.org/{i:08d}.jpg")
        pictures.append(_Picture(f"cc3m/images/{i:08d}.jpg", canvas, objects))
    _draw(root, seed, 5, pictures, run)
    table = root / "cc3m/Train_GCC-training.tsv"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _canvas(rng: np.random.Generator, sides: tuple[int, int], sizes: tuple[float, float]) -> Canvas:
    width, height = (int(side) for side in rng.integers(*sides, size=2, endpoint=True))
    return Canvas(width, height, str(rng.choice(list(GROUNDS))), sizes)


def _draw(
    root: Path, seed: int, part: int, pictures: Sequence[_Picture], run: RunTasks
) -> list[list[Placed]]:
    """Draw all pictures of a part in chunks; what was placed, in the order of `pictures`."""
    chunks = [
        _Chunk(str(root), seed, part, first, tuple(pictures[first : first + _CHUNK_IMAGES]))
        for first in range(0, len(pictures), _CHUNK_IMAGES)
    ]
    results = dict(run(_draw_chunk, chunks))
    return [placed for position in range(len(chunks)) for placed in results[position]]


def _draw_chunk(chunk: _Chunk) -> list[list[Placed]]:
    results = []
    for i, picture in enumerate(chunk.pictures):
        rng = np.random.default_rng([chunk.seed, chunk.part, chunk.first + i])
        image, placed = draw_scene(rng, picture.canvas, picture.objects)
        path = Path(chunk.root, picture.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="JPEG", quality=_JPEG_QUALITY)
        results.append(placed)
    return results


def _write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    temporary.replace(path)
