"""`longtail inspect`: counts, the frequency plot and the pictures of prepared shards."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipeline.arguments import build_parser
from pipeline.cli import inspect
from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.preparing import prepare_source
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Data, Source
from pipeline.report.inspection import inspect_sources
from pipeline.report.shard_facts import choose_samples, facts_of, look_at

NAMES = {1: "cup", 2: "frog<b>", 3: "owl", 4: "yak"}
FREQUENCIES = {1: "f", 2: "c", 3: "r", 4: "r"}
ON_IMAGE = {10 + k: [1] for k in range(12)} | {30: [2, 1], 31: [2, 2], 40: [3, 1], 50: []}
"""Category ids of the boxes of each image."""


def in_line(function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for position, argument in enumerate(arguments):
        yield position, function(argument)


def draw_raw(root: Path) -> None:
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id, categories in ON_IMAGE.items():
        width, height = 40 + image_id, 60
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{image_id}.png")
        images.append(
            {
                "id": image_id, "width": width, "height": height, "file_name": f"{image_id}.png",
                "neg_category_ids": [4] if image_id == 30 else [],
                "not_exhaustive_category_ids": [],
            }
        )  # fmt: skip
        for category in categories:
            # The first reaches over the edge of its image, and is clipped.
            box = [5, 5, 20, 70 if not annotations else 20]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category,
                 "bbox": box, "area": 400}
            )  # fmt: skip
    categories = [
        {"id": k, "name": name, "frequency": FREQUENCIES[k], "synset": f"s{k}.n.01"}
        for k, name in NAMES.items()
    ]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (root / "a.json").write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def world(module_path: Path) -> Path:
    draw_raw(module_path)
    source = Source(name="owls", format="lvis", images="images", annotations="a.json")
    data = Data(root=str(module_path), train=[source], samples_per_shard=6)
    prepare_source(source, data, in_line)
    return module_path


@pytest.fixture(scope="module")
def index(world: Path) -> Index:
    return load_index(str(world / "shards/owls"))


def run(*words: object) -> None:
    inspect(build_parser().parse_args(["inspect", *map(str, words)]))


def test_counts_are_those_of_the_raw_data(index: Index) -> None:
    known = facts_of(index)
    assert (known.samples, known.shards, known.boxes) == (16, 3, 18)
    assert (known.images_without_boxes, known.most_boxes, known.unlabelled_boxes) == (1, 2, 0)
    assert known.image_counts == {1: 14, 2: 2, 3: 1, 4: 0}
    assert known.box_counts == {1: 14, 2: 3, 3: 1, 4: 0}
    assert known.group_counts() == {"r": (2, 1), "c": (1, 1), "f": (1, 1)}
    assert known.shorter == [50, 51, 58, 60, 60]
    assert known.longer == [60, 60, 60, 80, 90]
    assert known.num_bytes == sum(Path(index.shard_url(k)).stat().st_size for k in range(3))
    assert known.dropped == {"box partly outside the image, clipped": 1}
    seen = look_at(index)
    assert (seen.samples, seen.captions, seen.coarse) == (16, 0, 0)
    assert (seen.with_negatives, seen.negatives, seen.not_exhaustive) == (1, 1, 0)


def ids_of(index: Index, places: Sequence[int]) -> list[int]:
    return index.image_id[list(places)].tolist()


def test_pictures_are_spread_over_categories_and_always_the_same(index: Index) -> None:
    three = choose_samples(index, 3)
    found = ids_of(index, three)
    assert found[0] == 40 and found[1] in (30, 31) and 1 in ON_IMAGE[found[2]]
    assert len(set(found)) == 3
    assert choose_samples(index, 3) == three
    assert sorted(choose_samples(index, 99)) == list(range(16))
    # From rare to frequent with even steps, or the rarest alone.
    assert ids_of(index, choose_samples(index, 1)) == [40]
    assert ids_of(index, choose_samples(index, 2))[0] == 40
    assert ids_of(index, choose_samples(index, 2))[1] not in (30, 31)
    assert ids_of(index, choose_samples(index, 2, rare_first=True))[1] in (30, 31)


def test_no_picture_is_shown_for_two_categories(tmp_path: Path) -> None:
    """Four images have all four categories, so that one is the best of each; others have none."""
    (tmp_path / "images").mkdir()
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    images, annotations = [], []
    for number in range(1, 41):
        Image.fromarray(pixels + number).save(tmp_path / f"images/{number}.png")
        images.append({"id": number, "width": 8, "height": 8, "file_name": f"{number}.png"})
        for category in (1, 2, 3, 4) if number > 36 else ():
            box = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append({**box, "bbox": [1, 1, 5, 5]})
    categories = [{"id": k, "name": name} for k, name in NAMES.items()]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(tree))
    source = Source(name="all", format="coco", images="images", annotations="a.json")
    index = prepare_source(source, Data(root=str(tmp_path), train=[source]), in_line)
    for rare_first in (False, True):
        chosen = choose_samples(index, 4, rare_first=rare_first)
        assert sorted(ids_of(index, chosen)) == [37, 38, 39, 40]


def test_pictures_of_one_category(index: Index) -> None:
    assert sorted(ids_of(index, choose_samples(index, 9, category_id=2))) == [30, 31]
    assert choose_samples(index, 9, category_id=4) == []
    assert len(choose_samples(index, 5, category_id=1)) == 5


def test_the_page_shows_plot_pictures_and_what_was_left_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(world / "shards/owls", "-o", tmp_path, "--samples", 4, "--verify")
    text = capsys.readouterr().out
    assert "images      16, 1 of them without boxes" in text
    assert "rare 2 (1 with boxes), common 1 (1 with boxes), frequent 1 (1 with boxes)" in text
    assert "left out    1 box partly outside the image, clipped" in text
    assert "all 3 shards have their sha256" in text
    page = (tmp_path / "owls.html").read_text(encoding="utf-8")
    bars = re.findall(r'<rect class="bar (\w+)".*?<title>(.*?)</title>', page)
    assert bars == [
        ("frequent", "cup: images 14, boxes 14"),
        ("common", "frog&lt;b&gt;: images 2, boxes 3"),
        ("rare", "owl: images 1, boxes 1"),
    ]
    assert page.count("data:image/jpeg;base64,") == 4
    assert '<rect class="found rare"' in page
    assert "annotation 1 of image 10" in page
    assert "frog<b>" not in page
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)


def test_a_category_is_asked_for_by_name(world: Path, tmp_path: Path) -> None:
    shards = world / "shards/owls"
    run(shards, "-o", tmp_path, "--category", "Owl", "--samples", 5)
    page = (tmp_path / "owls.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 1
    assert "Image 40, 2 boxes" in page
    run(shards, "-o", tmp_path, "--category", "yak")
    assert "No image has this category." in (tmp_path / "owls.html").read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match=r"'owls' is none of the 4 .* did you mean 'owl'"):
        run(shards, "-o", tmp_path, "--category", "owls")


def test_a_source_without_labels(world: Path, tmp_path: Path) -> None:
    source = Source(
        name="plain", format="lvis", images="images", annotations="a.json", use_labels=False
    )
    captions = Data(root=str(world), shards=str(tmp_path), train=[source])
    index = prepare_source(source, captions, in_line)
    assert facts_of(index).unlabelled_boxes == 18
    assert len(set(choose_samples(index, 5))) == 5
    run(tmp_path / "plain", "-o", tmp_path, "--samples", 3)
    page = (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "18 of them without a label" in page
    assert "Images of each category" not in page


def test_a_recipe_is_inspected_source_by_source(world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\ndata:\n  root: {world}\n  train:\n"
        "    - {name: owls, format: lvis, images: images, annotations: a.json}\n"
        "    - {name: more, format: lvis, images: images, annotations: a.json}\n"
        "training: {steps: 1, batch_size: 1}\n"
    )
    texts = inspect_sources(str(recipe), (), tmp_path, samples=1)
    assert next(texts).startswith("owls, at ")
    with pytest.raises(StorageError, match="source more: no prepared shards at"):
        next(texts)
    with pytest.raises(RecipeError, match="belongs to a recipe"):
        run(world / "shards/owls", "seed=1")
    with pytest.raises(RecipeError, match="--samples is -1"):
        run(world / "shards/owls", "--samples", -1)


def test_verify_finds_a_byte_that_no_picture_shows(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "owls"
    copy.mkdir()
    for file in (world / "shards/owls").iterdir():
        copy.joinpath(file.name).write_bytes(file.read_bytes())
    shard = copy / "000001.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    run(copy, "-o", tmp_path / "page")
    with pytest.raises(StorageError, match=r"000001\.tar"):
        run(copy, "-o", tmp_path / "page", "--verify")


def test_it_reads_shards_from_any_storage(world: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(world / "shards/owls") + "/", "/inspected/owls/", recursive=True)
    try:
        run("memory://inspected/owls", "-o", tmp_path / "a")
        run(world / "shards/owls", "-o", tmp_path / "b")
    finally:
        memory.rm("/inspected", recursive=True)

    def pictures(name: str) -> str:
        page = (tmp_path / name / "owls.html").read_text(encoding="utf-8")
        return hashlib.sha256("".join(re.findall(r"base64,[^\"]+", page)).encode()).hexdigest()

    assert pictures("a") == pictures("b")
