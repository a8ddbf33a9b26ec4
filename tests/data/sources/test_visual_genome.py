"""Visual Genome: names to categories, the frequency cut, and the real sample."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from raw_data import data_of, in_line, photograph, write

from pipeline.data.shards.ground_truth import load_ground_truth
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.sources import list_records
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

VG = Source.model_validate(
    {
        "name": "vg",
        "format": "visual_genome",
        "images": "vg",
        "annotations": "objects.json",
        "files": {"image_data": "image_data.json", "aliases": "object_alias.txt"},
        "min_instances": 2,
    }
)
RARE = "object of a category with fewer than 2 boxes, left out"


def thing(names: list[str], box: tuple[int, int, int, int], *synsets: str) -> dict[str, Any]:
    x, y, w, h = box
    return {"object_id": x + 100 * y, "names": names, "synsets": list(synsets),
            "x": x, "y": y, "w": w, "h": h}  # fmt: skip


def objects() -> list[dict[str, Any]]:
    return [
        {
            "image_id": 9,
            "objects": [
                thing(["Trees"], (1, 1, 4, 4), "tree.n.01"),
                thing(["tree "], (30, 20, 20, 20), "tree.n.01"),  # partly outside
                thing(["bike", "bicycle"], (2, 2, 5, 5), "bicycle.n.01"),
                thing(["zebra"], (3, 3, 6, 6)),
            ],
        },
        {
            "image_id": 4,
            "objects": [
                thing(["bike"], (2, 2, 5, 5), "bicycle.n.01"),
                thing(["bike"], (2, 2, 5, 5), "bicycle.n.01"),  # the same again
                thing([], (2, 2, 5, 5)),
                thing(["a tree"], (5, 5, 9, 9), "tree.n.01"),
                thing(["tree"], (5, 5, 0, 9)),  # empty
            ],
        },
    ]


def image_data() -> list[dict[str, Any]]:
    place = "https://cs.stanford.edu/people/rak248"
    folders = {9: "VG_100K", 4: "VG_100K_2", 5: "VG_100K"}
    return [
        {"image_id": k, "width": 40, "height": 30, "url": f"{place}/{folder}/{k}.jpg"}
        for k, folder in folders.items()
    ]


ALIASES = "tree,trees,a tree\nbicycle,cycle\nplant,tree\n"


def write_vg(root: Path, tree: object = None, images: object = None) -> None:
    write(root / "objects.json", objects() if tree is None else tree)
    write(root / "image_data.json", image_data() if images is None else images)
    write(root / "object_alias.txt", ALIASES)
    write(root / "vg" / "VG_100K" / "9.jpg", photograph(9))
    write(root / "vg" / "VG_100K_2" / "4.jpg", photograph(4))


def test_names_become_categories_by_alias_and_frequency(tmp_path: Path) -> None:
    write_vg(tmp_path)
    record_set = list_records(VG, str(tmp_path))
    tree, bike = record_set.vocabulary.categories
    assert (tree.id, tree.name, tree.synset) == (1, "tree", "tree.n.01")
    assert (tree.instance_count, tree.image_count) == (4, 2)
    assert (bike.id, bike.name, bike.synset, bike.instance_count) == (2, "bike", "bicycle.n.01", 3)
    four, nine = record_set.records
    assert (four.image_id, nine.image_id) == (4, 9)
    assert nine.boxes is not None and four.boxes is not None
    assert nine.boxes.tolist() == [[1, 1, 5, 5], [30, 20, 40, 30], [2, 2, 7, 7]]
    assert nine.category_ids.tolist() == [1, 1, 2]
    assert four.boxes.tolist() == [[2, 2, 7, 7], [5, 5, 14, 14]]
    assert Path(four.path) == tmp_path / "vg" / "VG_100K_2" / "4.jpg"
    assert record_set.dropped == {
        "object without a name, left out": 1,
        RARE: 1,
        "box given twice, left out": 1,
        "box empty or wholly outside the image, left out": 1,
        "box partly outside the image, clipped": 1,
    }
    assert "zebra" in record_set.examples[RARE][0]


def test_a_lower_cut_keeps_the_ids_and_adds_to_them(tmp_path: Path) -> None:
    write_vg(tmp_path)
    lower = list_records(VG.model_copy(update={"min_instances": 1}), str(tmp_path)).vocabulary
    assert lower.names == ["tree", "bike", "zebra"] and lower.ids == [1, 2, 3]
    assert lower.categories[2].synset is None
    with pytest.raises(DataError, match="no category has 30 boxes; the most frequent, tree, has 4"):
        list_records(VG.model_copy(update={"min_instances": None}), str(tmp_path))


def test_a_validation_part_has_the_categories_of_the_training_part(tmp_path: Path) -> None:
    """By name, not by its own ranks; boxes lie as people see an image that EXIF turns."""
    held_out = [
        {
            "image_id": 5,
            "objects": [
                *(thing(["zebra"], (k, 1, 4, 4)) for k in range(5)),
                *(thing(["Bike"], (k, 8, 4, 2)) for k in range(2)),
                thing(["trees"], (30, 20, 8, 6)),
            ],
        }
    ]
    write_vg(tmp_path)
    write(tmp_path / "held_out.json", held_out)
    turned = Image.Exif()
    turned[0x0112] = 6
    write(tmp_path / "vg" / "VG_100K" / "5.jpg", photograph(5, exif=turned))
    part = VG.model_copy(update={"name": "vg_val", "annotations": "held_out.json"})
    assert list_records(part, str(tmp_path)).vocabulary.names == ["zebra", "bike"]
    trained = list_records(VG, str(tmp_path)).vocabulary
    record_set = list_records(part, str(tmp_path), trained)
    assert record_set.vocabulary == trained
    assert record_set.records[0].category_ids.tolist() == [2, 2, 1]
    assert record_set.dropped == {
        "object of a name that is no category of the detector, left out": 5
    }
    index = prepare_source(part, data_of(tmp_path, VG), in_line, evaluated=True, vocabulary=trained)
    truth = load_ground_truth(index)
    assert truth["images"] == [{"id": 5, "file_name": "5.jpg", "width": 30, "height": 40}]
    assert [row["category_id"] for row in truth["annotations"]] == [2, 2, 1]
    # Of the 40 x 30 that are stored: columns are rows now, counted from the top right.
    assert truth["annotations"][2]["bbox"] == [4, 30, 6, 8]
    assert truth["categories"][0] == {"id": 1, "name": "tree", "image_count": 2}


def test_a_synset_that_most_boxes_do_not_have_is_not_the_categorys(tmp_path: Path) -> None:
    tree = [
        {
            "image_id": 9,
            "objects": [
                thing(["trunk"], (1, 1, 4, 4), "trunk.n.01"),
                thing(["trunk"], (2, 1, 4, 4), "luggage.n.01"),
                thing(["trunk"], (3, 1, 4, 4)),
            ],
        }
    ]
    write_vg(tmp_path, tree)
    (trunk,) = list_records(VG, str(tmp_path)).vocabulary.categories
    assert trunk.synset is None


def test_without_aliases_names_stand_for_themselves(tmp_path: Path) -> None:
    write_vg(tmp_path)
    files = VG.files.model_copy(update={"aliases": None})
    source = VG.model_copy(update={"files": files, "min_instances": 1})
    names = list_records(source, str(tmp_path)).vocabulary.names
    assert sorted(names) == ["a tree", "bike", "tree", "trees", "zebra"]


def changed(position: int, **changes: object) -> list[dict[str, Any]]:
    tree = image_data()
    tree[position].update(changes)
    return tree


@pytest.mark.parametrize(
    ("tree", "images", "message"),
    [
        ([{**objects()[0], "image_id": 7}], None, "image 7 is not in `files.image_data`"),
        ([objects()[0], objects()[0]], None, "image 9 is given twice"),
        ([{"image_id": "9", "objects": []}], None, "entry 0 must have an integer image_id"),
        ([{"image_id": 9, "objects": [3]}], None, "image 9: 3 is no object"),
        ([{"image_id": 9, "objects": [{"names": ["x"], "x": 1}] * 2}], None, "four numbers"),
        ([], None, "no usable sample"),
        (None, {"images": []}, "`files.image_data` is image_data.json"),
        (None, changed(0, url=None), "entry 0 has no url"),
        (None, changed(0, width=0), "width 0 .* must be positive integers"),
        (None, changed(0, image_id=4), "image 4 is given twice"),
    ],
)
def test_files_that_cannot_be_are_refused(
    tmp_path: Path, tree: object, images: object, message: str
) -> None:
    write_vg(tmp_path, tree, images)
    with pytest.raises(DataError, match=message):
        list_records(VG, str(tmp_path))


def test_missing_files_and_aliases_in_json_are_refused(tmp_path: Path) -> None:
    write_vg(tmp_path)
    write(tmp_path / "object_alias.txt", "[1]")
    with pytest.raises(DataError, match=r"`files.aliases` is object_alias\.txt"):
        list_records(VG, str(tmp_path))
    (tmp_path / "image_data.json").unlink()
    with pytest.raises(RecipeError, match=r"vg: `files\.image_data` 'image_data\.json' is no file"):
        list_records(VG, str(tmp_path))


@pytest.mark.parametrize(
    ("release", "total"),
    # PROVENANCE counts the objects of v1.2; those of v1.4 were counted by a loop over the json.
    [("objects_v1_2.json", 3671), ("objects.json", 2484)],
)
def test_real_sample(tmp_path: Path, shared_data: Path, release: str, total: int) -> None:
    folder = shared_data / "visual_genome"
    annotations = folder / release / "objects.json_samples.json"
    images = folder / "image_data.json" / "image_data.json_samples.json"
    aliases = folder / "object_alias.txt"
    # There are no photographs; one of the stated size stands for those that a user has.
    write(tmp_path / "vg" / "VG_100K_2" / "1.jpg", photograph(size=(800, 600)))
    source = VG.model_copy(
        update={
            "annotations": str(annotations),
            "min_instances": 1,
            "files": VG.files.model_copy(
                update={"image_data": str(images), "aliases": str(aliases)}
            ),
        }
    )
    record_set = list_records(source, str(tmp_path))
    kept = sum(len(record.category_ids) for record in record_set.records)
    dropped = {k: n for k, n in record_set.dropped.items() if k != CLIPPED}
    assert len(record_set.records) == 100
    assert kept + sum(dropped.values()) == total
    assert set(dropped) <= {"box given twice, left out"}, "of the sample nothing else is wrong"
    first_of = {}
    for line in aliases.read_text().splitlines():
        for name in line.split(","):
            first_of.setdefault(name, line.split(",")[0])
    tree = json.loads(annotations.read_text())
    names = Counter(
        first_of.get(name, name)
        for image in tree
        for entry in image["objects"]
        # "empty  wine glasses" has two spaces.
        for name in [" ".join(entry["names"][0].lower().split())]
    )
    assert dict(names) == {c.name: c.instance_count for c in record_set.vocabulary.categories}
    cut = list_records(source.model_copy(update={"min_instances": 30}), str(tmp_path))
    frequent = {name: count for name, count in names.items() if count >= 30}
    assert {c.name: c.instance_count for c in cut.vocabulary.categories} == frequent
    rare = cut.dropped["object of a category with fewer than 30 boxes, left out"]
    assert rare == total - sum(frequent.values())
    data = data_of(tmp_path, source, bad_sample_budget=99)
    index = prepare_source(source, data, in_line, evaluated=True)
    assert len(index) == 1 and len(index.report["unreadable"]) == 99
    sample = index.read(0)
    (image,) = [image for image in tree if image["image_id"] == 1]
    assert sample.key == "000000000001"
    assert 0 < len(sample.boxes) <= len(image["objects"])
    truth = load_ground_truth(index)
    assert [image["id"] for image in truth["images"]] == [1], "99 have no photograph"
    corners = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in truth["annotations"])]
    assert corners == sample.boxes.tolist()


CLIPPED = "box partly outside the image, clipped"
