"""Annotations with a part removed: nested, no category empty, and told as incomplete."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.shards.preparing import prepare_source
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Data, Source
from pipeline.study.drop import drop_annotations
from pipeline.study.fewer import annotated, choose_kept

COUNTS = {1: 60, 2: 25, 3: 6, 4: 1, 9: 0}
"""Annotations of each category."""


def lvis_tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    # Ids in no order, as published files may have them.
    images: list[dict[str, Any]] = [
        {"id": number, "width": 64, "height": 48, "file_name": f"{number}.png",
         "neg_category_ids": [9], "not_exhaustive_category_ids": [3] if number == 17 else []}
        for number in (40, 17, 23, 5, 31, 8)
    ]  # fmt: skip
    annotations = []
    for category, number in COUNTS.items():
        for _ in range(number):
            image = images[rng.integers(len(images))]
            place = [float(v) for v in rng.integers(0, 20, 2)]
            annotations.append(
                {"id": 1000 - len(annotations), "image_id": image["id"], "category_id": category,
                 "bbox": [*place, 10.0, 12.0], "area": 120.0, "segmentation": [[0, 0, 5, 5, 0, 5]]}
            )  # fmt: skip
    groups = {1: "f", 2: "c", 3: "r", 4: "r", 9: "r"}
    categories = [
        {"id": number, "name": f"thing_{number}", "synset": f"thing.n.{number}",
         "frequency": groups[number], "instance_count": COUNTS[number], "image_count": 99}
        for number in (9, 4, 3, 2, 1)
    ]  # fmt: skip
    return {"info": {"year": 1}, "images": images, "annotations": annotations,
            "categories": categories}  # fmt: skip


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(1)
    for image in lvis_tree()["images"]:
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / image["file_name"])
    (tmp_path / "lvis.json").write_text(json.dumps(lvis_tree()))
    return tmp_path


def dropped(
    folder: Path, fraction: float, seed: int = 0, name: str = "lvis.json"
) -> dict[str, Any]:
    output = folder / f"out_{fraction:g}_{seed}.json"
    drop_annotations(str(folder / name), [], output, fraction=fraction, seed=seed)
    tree: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return tree


def ids(tree: dict[str, Any]) -> set[int]:
    return {row["id"] for row in tree["annotations"]}


def test_fractions_are_nested_and_no_category_loses_all(raw: Path) -> None:
    before = ids(lvis_tree())
    earlier = before
    for tenth in range(1, 10):
        tree = dropped(raw, tenth / 10)
        left = ids(tree)
        assert left < earlier, "what is removed at a fraction is removed at every larger one"
        assert len(before) - len(left) == round(tenth / 10 * 92)
        counts = Counter(row["category_id"] for row in tree["annotations"])
        assert set(counts) == {1, 2, 3, 4}
        earlier = left
    nearly_all = ids(dropped(raw, 0.999))
    assert len(nearly_all) == 4, "one of each category is the least"


def test_the_choice_is_the_seeds_and_not_that_of_the_files_order(raw: Path) -> None:
    tree = lvis_tree()
    for part in ("images", "annotations", "categories"):
        tree[part].reverse()
    (raw / "turned.json").write_text(json.dumps(tree))
    first = ids(dropped(raw, 0.4, seed=3))
    assert ids(dropped(raw, 0.4, seed=3, name="turned.json")) == first
    assert ids(dropped(raw, 0.4, seed=4)) != first


def test_every_annotation_is_as_likely_to_stay() -> None:
    found = annotated(lvis_tree(), "lvis.json", federated=True)
    times: Counter[int] = Counter()
    for seed in range(60):
        times.update(found.annotation_id[choose_kept(found, 0.5, seed)].tolist())
    common = [times[row["id"]] for row in lvis_tree()["annotations"] if row["category_id"] == 1]
    # 60 draws of one half each: the mean of 60 such counts is within four standard errors of 30.
    assert abs(np.mean(common) - 30) < 4 * (60 * 0.25 / 60) ** 0.5
    assert min(common) > 10 and max(common) < 50


def test_lists_say_what_is_incomplete_now(raw: Path) -> None:
    tree, before = dropped(raw, 0.5), lvis_tree()
    gone: dict[int, set[int]] = {}
    for row in before["annotations"]:
        if row["id"] not in ids(tree):
            gone.setdefault(row["image_id"], set()).add(row["category_id"])
    for image, old in zip(tree["images"], before["images"], strict=True):
        assert image["id"] == old["id"], "all images stay"
        incomplete = {*old["not_exhaustive_category_ids"], *gone.get(image["id"], set())}
        assert image["not_exhaustive_category_ids"] == sorted(incomplete)
        assert image["neg_category_ids"] == [9]
    assert gone, "something was removed"
    counts = Counter(row["category_id"] for row in tree["annotations"])
    for category, old in zip(tree["categories"], before["categories"], strict=True):
        own = [r["image_id"] for r in tree["annotations"] if r["category_id"] == category["id"]]
        assert category["instance_count"] == counts[category["id"]]
        assert category["image_count"] == len(set(own))
        assert category["frequency"] == old["frequency"], "groups stay as published"
    said = tree["info"]["longtail_drop_annotations"]
    assert tree["info"]["year"] == 1
    assert (said["removed"], said["instances"], said["fraction"], said["seed"]) == (46, 92, 0.5, 0)
    assert not any("segmentation" in row for row in tree["annotations"])


def test_what_is_written_can_be_prepared(raw: Path) -> None:
    tree = dropped(raw, 0.7)
    source = Source(name="less", format="lvis", images="images", annotations="out_0.7_0.json")

    def in_line(function: Any, arguments: Any) -> Any:
        yield from ((k, function(argument)) for k, argument in enumerate(arguments))

    index = prepare_source(source, Data(root=str(raw), train=[source]), in_line)
    found = Counter(index.category_ids.tolist())
    assert found == Counter(row["category_id"] for row in tree["annotations"])
    for place in range(index.num_samples):
        sample = index.read(place)
        image = next(image for image in tree["images"] if image["id"] == sample.image_id)
        assert sample.not_exhaustive_category_ids == tuple(image["not_exhaustive_category_ids"])


def test_coco_keeps_crowds_and_gets_no_lists(raw: Path) -> None:
    tree = lvis_tree()
    for image in tree["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    crowds = tree["annotations"][:10]
    for row in crowds:
        row["iscrowd"] = 1
    # The only other one of category 4 is empty, which `prepare` would leave out.
    tree["annotations"].append({**tree["annotations"][-1], "id": 5000, "bbox": [1, 1, 0, 4]})
    (raw / "coco.json").write_text(json.dumps(tree))
    left = dropped(raw, 0.9, name="coco.json")
    assert {row["id"] for row in crowds} | {5000} < ids(left)
    ordinary = [row for row in left["annotations"] if row["bbox"][2] and not row.get("iscrowd")]
    assert {row["category_id"] for row in ordinary} == {1, 2, 3, 4}
    assert len(ordinary) == 82 - round(0.9 * 82)
    assert not any("not_exhaustive_category_ids" in image for image in left["images"])
    page = (raw / "out_0.9_0.html").read_text(encoding="utf-8")
    assert "look absent to whoever learns" in page and "11 annotations are flagged" in page


def test_the_page_and_the_csv_count_before_and_after(raw: Path) -> None:
    text = drop_annotations(str(raw / "lvis.json"), [], raw / "half.json", fraction=0.5, seed=0)
    assert "46 of 92 instances removed (50.0%; 50% asked for)" in text
    page = (raw / "half.html").read_text(encoding="utf-8")
    assert "thing 1: " in page and "of 60 instances" in page
    assert "becomes" not in page and "not exhaustively annotated" in page
    curves = re.findall(r'<polyline class="line [^"]+"[^>]*><title>(\w+)<', page)
    assert curves == ["before", "after", "left"]
    lines = (raw / "half.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "category_id,name,frequency,before,after"
    assert lines[1].startswith("1,thing_1,f,60,") and lines[-1] == "9,thing_9,r,0,0"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_fraction_is_between_0_and_1(raw: Path, fraction: float) -> None:
    with pytest.raises(RecipeError, match="above 0 and below 1"):
        dropped(raw, fraction)


def test_bad_places_and_outputs_are_refused(raw: Path) -> None:
    def drop(place: object, output: str = "x.json", *overrides: str) -> str:
        return drop_annotations(str(place), overrides, raw / output, fraction=0.5)

    with pytest.raises(RecipeError, match=r"name FILE\.json"):
        drop(raw / "lvis.json", "x.csv")
    with pytest.raises(RecipeError, match="is the file that is read"):
        drop(raw / "lvis.json", "lvis.json")
    with pytest.raises(RecipeError, match="no annotation file"):
        drop(raw / "absent.json")
    with pytest.raises(RecipeError, match="belongs to a recipe"):
        drop(raw / "lvis.json", "x.json", "data.root=x")
    (raw / "list.json").write_text("[]")
    with pytest.raises(DataError, match="this is list"):
        drop(raw / "list.json")
    tree = lvis_tree()
    tree["annotations"] = []
    (raw / "empty.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="no annotation to remove"):
        drop(raw / "empty.json")
    tree = lvis_tree()
    tree["annotations"][0]["category_id"] = 77
    (raw / "unknown.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="77 is an unknown category id"):
        drop(raw / "unknown.json")
    assert not (raw / "x.json").exists(), "nothing is left behind"
