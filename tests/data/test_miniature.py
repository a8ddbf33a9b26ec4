"""The miniature world: its formats are the published ones, and its pixels follow from the seed."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.miniature import world as miniature
from pipeline.data.miniature.drawing import COMPOSITIONS, MAX_HIDDEN, Canvas, draw_scene
from pipeline.data.miniature.sizes import WORLDS, Band
from pipeline.data.miniature.world import MARKER, draw_world
from pipeline.errors import RecipeError
from pipeline.recipe import Source


def backwards(function: Callable, arguments: Sequence) -> Iterator[tuple[int, object]]:
    """Runs tasks in another order than they were given in, as a cluster does."""
    order = list(range(len(arguments)))
    random.Random(0).shuffle(order)
    yield from ((position, function(arguments[position])) for position in reversed(order))


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    draw_world(root, "tiny", 7)
    return root


def load(root: Path, split: str) -> dict:
    return json.loads((root / f"annotations/lvis_v1_{split}.json").read_text())


def test_same_bytes_in_any_order_and_chunking(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniature, "_CHUNK_IMAGES", 7)
    draw_world(tmp_path, "tiny", 7, run_tasks=backwards)
    assert digests(tmp_path) == digests(tiny)


def test_another_seed_draws_another_world(tiny: Path, tmp_path: Path) -> None:
    draw_world(tmp_path, "tiny", 8)
    ours, theirs = digests(tmp_path), digests(tiny)
    images = [name for name in ours if name.endswith("jpg") and name in theirs]
    assert images and all(ours[name] != theirs[name] for name in images)


def test_a_world_is_drawn_once_and_no_other_over_it(tiny: Path) -> None:
    before = (tiny / MARKER).stat().st_mtime_ns
    draw_world(tiny, "tiny", 7)
    assert (tiny / MARKER).stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"seed.*data\.root"):
        draw_world(tiny, "tiny", 8)


def test_a_world_cut_short_is_drawn_again(tiny: Path, tmp_path: Path) -> None:
    def dies(function: Callable, arguments: Sequence) -> Iterator[tuple[int, object]]:
        function(arguments[0])
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        draw_world(tmp_path, "tiny", 7, run_tasks=dies)
    assert not (tmp_path / MARKER).exists()
    draw_world(tmp_path, "tiny", 7)
    assert digests(tmp_path) == digests(tiny)


@pytest.mark.parametrize("split", ["train", "val"])
def test_lvis_annotations_hold_what_lvis_promises(tiny: Path, split: str) -> None:
    document = load(tiny, split)
    images = {image["id"]: image for image in document["images"]}
    assert [c["id"] for c in document["categories"]] == list(range(1, 13))
    assert len(images) == len(document["images"])
    assert len({a["id"] for a in document["annotations"]}) == len(document["annotations"])
    positives: dict[int, set[int]] = {image_id: set() for image_id in images}
    for annotation in document["annotations"]:
        image = images[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + width <= image["width"] and y + height <= image["height"]
        assert 0 < annotation["area"] <= width * height
        positives[image["id"]].add(annotation["category_id"])
    for image_id, image in images.items():
        assert not positives[image_id] & set(image["neg_category_ids"])
        assert set(image["not_exhaustive_category_ids"]) <= positives[image_id]
        tail = "/".join(image["coco_url"].split("/")[-2:])
        assert Image.open(tiny / "lvis" / tail).size == (image["width"], image["height"])
    assert set().union(*positives.values()) == set(range(1, 13)), "every category appears"


def test_frequencies_follow_from_the_counts(tiny: Path) -> None:
    document = load(tiny, "train")
    for category in document["categories"]:
        own = [a for a in document["annotations"] if a["category_id"] == category["id"]]
        assert category["instance_count"] == len(own)
        assert category["image_count"] == len({a["image_id"] for a in own})
        expected = "r" if category["image_count"] <= 10 else "c"
        assert category["frequency"] == expected and category["image_count"] <= 100
        assert category["synset"] == f"{category['name']}.n.01"
    assert load(tiny, "val")["categories"] == document["categories"]
    assert {i["id"] for i in document["images"]}.isdisjoint(
        i["id"] for i in load(tiny, "val")["images"]
    )


def test_quickstart_plan_has_a_long_tail() -> None:
    """Twenty-four categories in each band, at LVIS's own thresholds, without drawing a pixel."""
    world = WORLDS["quickstart"]
    counts = np.array([count for band in world.train for count in band.counts()])
    assert Counter("r" if c <= 10 else "c" if c <= 100 else "f" for c in counts) == {
        "f": 24,
        "c": 24,
        "r": 24,
    }
    images = miniature._assign(np.random.default_rng(0), counts, miniature._OBJECTS_PER_IMAGE)
    assert 1000 <= len(images) <= 1200 and all(images)
    assert all(len(set(columns)) == len(columns) for columns in images)
    seen = Counter(column for columns in images for column in columns)
    assert [seen[column] for column in range(72)] == counts.tolist()
    assert min(count for band in world.validation for count in band.counts()) >= 5


def test_rare_categories_of_the_benchmark_have_shapes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other category of LVIS or Objects365 shows them, so nothing else teaches them."""
    world = replace(
        WORLDS["benchmark"],
        train=(Band(24, 14, 14), Band(24, 12, 12), Band(24, 2, 1)),
        validation=(Band(24, 2, 2),) * 3,
        objects365=Band(48, 2, 2),
        imagenet_images=(1, 1),
        captions=4,
    )
    monkeypatch.setitem(WORLDS, "benchmark", world)
    draw_world(tmp_path, "benchmark", 0)
    categories = load(tmp_path, "train")["categories"]
    shapes = {c["name"]: c["name"].split("_")[-1] for c in categories}
    assert len(shapes) == 72
    rare = {c["name"] for c in categories if c["frequency"] == "r"}
    assert len(rare) == 24
    assert all((shape in ("star", "cross")) == (name in rare) for name, shape in shapes.items())
    document = json.loads((tmp_path / "objects365/zhiyuan_objv2_train.json").read_text())
    others = {c["name"].lower().split()[-1] for c in document["categories"]}
    assert others == {"disc", "ring", "square", "triangle"}


def test_objects365_has_other_categories(tiny: Path) -> None:
    document = json.loads((tiny / "objects365/zhiyuan_objv2_train.json").read_text())
    names = {c["name"].lower() for c in document["categories"]}
    lvis = {c["name"].replace("_", " ") for c in load(tiny, "train")["categories"]}
    assert len(names) == 6 and not names & lvis
    for image in document["images"]:
        path = tiny / "objects365" / image["file_name"]
        assert Image.open(path).size == (image["width"], image["height"])
        assert image["file_name"].startswith("images/v1/patch")
    assert {a["category_id"] for a in document["annotations"]} == set(range(1, 7))


def test_imagenet_has_every_rare_category(tiny: Path) -> None:
    rows = (tiny / "imagenet21k/wnid_to_lvis.tsv").read_text().splitlines()
    assert rows[0].split("\t")[0] == "wnid"
    table = {row.split("\t")[0]: row.split("\t")[1:] for row in rows[1:]}
    rare = {c["id"] for c in load(tiny, "train")["categories"] if c["frequency"] == "r"}
    assert rare < {int(values[0]) for values in table.values()}
    folders = {path.name for path in (tiny / "imagenet21k").iterdir() if path.is_dir()}
    assert folders == set(table)
    assert all(2 <= len(list((tiny / "imagenet21k" / f).glob("*.JPEG"))) <= 4 for f in folders)


def test_captions_name_what_is_drawn(tiny: Path) -> None:
    rows = (tiny / "cc3m/Train_GCC-training.tsv").read_text().splitlines()
    names = [composition.name for composition in COMPOSITIONS]
    for i, row in enumerate(rows):
        caption, url = row.split("\t")
        assert 1 <= sum(caption.count(name) for name in names) <= 2
        assert (tiny / "cc3m/images" / url.rsplit("/", 1)[1]).is_file() and f"{i:08d}" in url
    assert len(rows) == 96


def test_source_formats_read_the_world(tiny: Path) -> None:
    from pipeline.data.sources import list_records

    lvis = Source(
        name="lvis", format="lvis", images="lvis", annotations="annotations/lvis_v1_train.json"
    )
    records = list_records(lvis, str(tiny))
    assert len(records.records) == len(load(tiny, "train")["images"])
    assert records.vocabulary.num_categories == 12
    imagenet = Source(
        name="inet",
        format="imagenet21k",
        images="imagenet21k",
        annotations="imagenet21k/wnid_to_lvis.tsv",
    )
    assert len(list_records(imagenet, str(tiny)).records) == len(
        list((tiny / "imagenet21k").rglob("*.JPEG"))
    )


def test_boxes_are_tight_and_objects_stay_visible() -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        chosen = [COMPOSITIONS[i] for i in rng.integers(len(COMPOSITIONS), size=6)]
        canvas = Canvas(128, 112, "sand", (20, 70))
        _, placed = draw_scene(np.random.default_rng(seed), canvas, chosen)
        _, alone = draw_scene(np.random.default_rng(seed), canvas, chosen[:1])
        assert len(placed) == 6
        assert placed[0].area >= (1 - MAX_HIDDEN) * alone[0].area
        x0, y0, x1, y1 = alone[0].box
        assert placed[0].box[0] >= x0 and placed[0].box[2] <= x1
        assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 112
