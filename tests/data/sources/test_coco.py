"""COCO and its kin on generated files and on real ones; files given to the wrong format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_data import LVIS, OBJECTS365, data_of, in_line, lvis_tree, photograph, write, write_lvis

from pipeline.data.shards.index import Index
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.sources import RecordSet, list_records, read_record
from pipeline.data.sources.instances import read_instances
from pipeline.errors import DataError
from pipeline.recipe import Source

COCO = Source(name="coco", format="coco", images="coco", annotations="coco.json")
CROWD = "box around a crowd, left out"


def coco_tree() -> dict[str, list[dict]]:
    """Three images of 40x30: boxes of every kind, boxes, none."""
    annotations = [
        (1, 1, [1, 2, 5, 6], 0),
        (1, 1, [1, 2, 5, 6], 0),  # the same again
        (1, 90, [1, 2, 5, 6], 0),  # the same place, another thing
        (1, 90, [0, 0, 40, 30], 1),  # a crowd
        (1, 1, [30, 20, 20, 20], 0),  # partly outside
        (1, 1, [4, 4, 0, 9], 0),  # empty
        (2, 90, [3, 3, 4, 4], 0),
    ]
    return {
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "images": [
            {
                "id": k,
                "width": 40,
                "height": 30,
                "file_name": f"{k:012d}.jpg",
                "coco_url": f"http://images.cocodataset.org/train2017/{k:012d}.jpg",
            }
            for k in (1, 2, 3)
        ],
        "annotations": [
            {"id": k, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for k, (image, category, box, crowd) in enumerate(annotations)
        ],
    }


def write_coco(root: Path, tree: dict[str, list[dict]] | None = None) -> None:
    tree = tree or coco_tree()
    write(root / "coco.json", tree)
    for image in tree["images"]:
        write(root / "coco" / "train2017" / f"{image['id']:012d}.jpg", photograph(image["id"]))


def test_coco_leaves_out_and_counts(tmp_path: Path) -> None:
    write_coco(tmp_path)
    record_set = list_records(COCO, str(tmp_path))
    first, second, empty = record_set.records
    assert first.boxes is not None and empty.boxes is not None
    assert first.boxes.tolist() == [[1, 2, 6, 8], [1, 2, 6, 8], [30, 20, 40, 30]]
    assert first.category_ids.tolist() == [1, 90, 1]
    assert first.not_exhaustive_category_ids == (90,), "toothbrushes are in the crowd too"
    assert second.not_exhaustive_category_ids == ()
    assert empty.boxes.shape == (0, 4)
    assert record_set.vocabulary.ids == [1, 90]
    assert record_set.dropped == {
        "box given twice, left out": 1,
        CROWD: 1,
        "box partly outside the image, clipped": 1,
        "box empty or wholly outside the image, left out": 1,
    }
    assert read_record(first).key == "000000000001"


def test_of_annotations_nothing_is_held_that_nobody_reads(tmp_path: Path) -> None:
    """Masks are most of a file, and what is left of 24 million boxes has to fit into memory."""
    tree = coco_tree()
    for annotation in tree["annotations"]:
        annotation |= {"segmentation": [[1.0] * 100], "area": 7.5, "isfake": 0}
    write_coco(tmp_path, tree)
    held = [a for some in read_instances(COCO, str(tmp_path)).by_image.values() for a in some]
    assert len(held) == 7
    keys = {"id", "image_id", "category_id", "bbox", "iscrowd"}
    assert all(set(annotation) == keys for annotation in held)


def test_a_crowd_is_an_ordinary_box_when_the_recipe_keeps_it(tmp_path: Path) -> None:
    write_coco(tmp_path)
    record_set = list_records(COCO.model_copy(update={"keep_flagged": True}), str(tmp_path))
    boxes = record_set.records[0].boxes
    assert boxes is not None and [0, 0, 40, 30] in boxes.tolist()
    assert record_set.records[0].not_exhaustive_category_ids == ()
    assert CROWD not in record_set.dropped


@pytest.mark.parametrize("form", ["coco", "lvis"])
@pytest.mark.parametrize(
    ("coco_url", "file_name", "on_disk", "images"),
    [
        ("http://mscoco.org/images/7", f"COCO_val2014_{7:012d}.jpg", "i/val2014/@.jpg", "i"),
        (None, f"COCO_val2014_{7:012d}.jpg", "i/@.jpg", "i"),
        (None, f"COCO_val2014_{7:012d}.jpg", f"i/train2017/{7:012d}.jpg", "i"),
        (None, f"COCO_train2014_{7:012d}.jpg", f"i/{7:012d}.jpg", "i"),
        (None, f"{7:012d}.jpg", f"i/{7:012d}.jpg", "i"),
    ],
)
def test_photographs_are_found_by_the_names_of_2014_and_of_2017(
    tmp_path: Path, form: str, coco_url: str | None, file_name: str, on_disk: str, images: str
) -> None:
    tree = coco_tree() if form == "coco" else lvis_tree(1)
    tree["images"], tree["annotations"] = tree["images"][:1], []
    tree["images"][0] |= {"coco_url": coco_url, "file_name": file_name}
    path = tmp_path / on_disk.replace("@.jpg", file_name)
    if "val2014" in on_disk:
        tree["images"][0]["file_name"] = f"val2014/{file_name}"
    write(tmp_path / "a.json", tree)
    write(path, photograph())
    source = Source(name="some", format=form, images=images, annotations="a.json")  # type: ignore[arg-type]
    (record,) = list_records(source, str(tmp_path)).records
    assert Path(record.path) == path and record.num_bytes == len(photograph())


def test_an_absent_image_goes_by_the_name_of_a_file(tmp_path: Path) -> None:
    tree = coco_tree()
    tree["images"][1]["coco_url"] = "http://mscoco.org/images/2"
    write_coco(tmp_path, tree)
    (tmp_path / "coco" / "train2017" / f"{2:012d}.jpg").unlink()
    absent = list_records(COCO, str(tmp_path)).records[1]
    assert absent.num_bytes is None and Path(absent.path).name == f"{2:012d}.jpg"


def objects365_tree(
    names: tuple[str, ...] = ("images/v2/patch16/objects365_v2_00900001.jpg",),
    categories: tuple[tuple[int, str], ...] = ((1, "Person"),),
) -> dict[str, list[dict]]:
    return {
        "categories": [{"id": number, "name": name} for number, name in categories],
        "images": [
            {"id": k, "width": 40, "height": 30, "file_name": name} for k, name in enumerate(names)
        ],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 1}
        ],
    }


V2 = {4: "Other Shoes", 33: "Necklace", 80: "Mirror"}
V1 = {4: "hat", 33: "umbrella", 80: "pen"}


def all_365(known: dict[int, str]) -> tuple[tuple[int, str], ...]:
    return tuple((number, known.get(number, f"thing {number}")) for number in range(1, 366))


@pytest.mark.parametrize(
    ("categories", "name", "own"),
    [
        (V1, "images/v2/patch16/objects365_v2_00900001.jpg", 1),
        (V1, "images/v1/patch6/objects365_v1_00300001.jpg", 1),
        (V2, "obj365_train_000000255476.jpg", 2),
    ],
)
def test_objects365_ids_of_one_version_are_not_read_for_the_other(
    tmp_path: Path, categories: dict[int, str], name: str, own: int
) -> None:
    write(tmp_path / "objects365.json", objects365_tree((name,), all_365(categories)))
    write(tmp_path / "objects365" / Path(name).name, photograph())
    with pytest.raises(DataError, match=rf"those of Objects365 v{own}.*{Path(name).name}"):
        list_records(OBJECTS365, str(tmp_path))


@pytest.mark.parametrize(
    ("categories", "name"),
    [
        (V1, "obj365_val_000000354609.jpg"),
        (V2, "images/v2/patch16/objects365_v2_00900001.jpg"),
        (V2, "images/v1/patch6/objects365_v1_00300001.jpg"),
    ],
)
def test_objects365_is_read_in_both_versions(
    tmp_path: Path, categories: dict[int, str], name: str
) -> None:
    write(tmp_path / "objects365.json", objects365_tree((name,), all_365(categories)))
    write(tmp_path / "objects365" / Path(name).name, photograph())
    record_set = list_records(OBJECTS365, str(tmp_path))
    assert record_set.vocabulary.num_categories == 365 and record_set.dropped == {CROWD: 1}
    assert record_set.records[0].not_exhaustive_category_ids == (1,)


def test_images_that_the_objects365_archives_lack_cost_no_budget(tmp_path: Path) -> None:
    names = (
        "images/v2/patch16/objects365_v2_00908726.jpg",
        "images/v1/patch6/objects365_v1_00320532.jpg",
        "images/v1/patch6/objects365_v1_00320534.jpg",
        "images/v2/patch16/objects365_v2_00908727.jpg",
        "images/v2/patch16/objects365_v2_00908728.jpg",
    )
    write(tmp_path / "objects365.json", objects365_tree(names))
    for name in (names[1], names[4]):
        write(tmp_path / "objects365" / Path(name).parent.name / Path(name).name, photograph())
    record_set = list_records(OBJECTS365, str(tmp_path))
    reason = "image that the published archives are known to lack, left out"
    assert record_set.dropped[reason] == 2
    assert names[0] in record_set.examples[reason][0]
    # One of the three is there after all, and one image is absent that should not be.
    assert [record.num_bytes is None for record in record_set.records] == [False, True, False]
    index = prepare_source(OBJECTS365, data_of(tmp_path, OBJECTS365, LVIS), in_line)
    assert len(index.report["unreadable"]) == 1
    assert index.report["dropped"][reason] == 2


VISUAL_GENOME: list[dict] = [{"image_id": 1, "objects": [{"object_id": 1, "names": ["tree"]}]}]
FILES: dict[str, tuple[object, str]] = {
    "lvis": (lvis_tree(), "LVIS annotations"),
    "coco": (coco_tree(), "COCO instances"),
    "objects365": (objects365_tree(), "Objects365 annotations"),
    "visual_genome": (VISUAL_GENOME, "Visual Genome objects"),
}
OTHERS: dict[str, object] = {
    "captions": {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]},
    "panoptic segments": {"annotations": [{"segments_info": []}], "images": []},
    "Visual Genome relationships": [{"image_id": 1, "relationships": []}],
    "Visual Genome image_data.json": [{"image_id": 1, "width": 3, "height": 3, "url": "u"}],
    "detections": [{"image_id": 1, "category_id": 1, "bbox": [], "score": 0.5}],
}


def source_of(form: str) -> Source:
    files = {"image_data": "image_data.json"} if form == "visual_genome" else {}
    tree = {"name": "x", "format": form, "images": "i", "annotations": "a.json", "files": files}
    return Source.model_validate(tree)


@pytest.mark.parametrize("wanted", FILES)
@pytest.mark.parametrize("given", [*FILES, *OTHERS])
def test_a_file_of_another_data_set_is_refused_by_name(
    tmp_path: Path, wanted: str, given: str
) -> None:
    if wanted == given:
        return
    tree, looks = FILES.get(given, (OTHERS.get(given), given))
    write(tmp_path / "a.json", tree)
    write(tmp_path / "i" / "x.jpg", photograph())
    with pytest.raises(DataError, match=f"this looks like {looks}") as error:
        list_records(source_of(wanted), str(tmp_path))
    assert (f"`format: {given}`" in str(error.value)) == (given in FILES)


def test_a_data_set_of_ones_own_in_the_form_of_coco_is_read(tmp_path: Path) -> None:
    tree = coco_tree()
    for image in tree["images"]:
        image.pop("coco_url")
        image["file_name"] = f"frame_{image['id']}.jpg"
        write(tmp_path / "coco" / image["file_name"], photograph())
    write(tmp_path / "coco.json", tree)
    assert len(list_records(COCO, str(tmp_path)).records) == 3


def test_a_size_other_than_annotated_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write(tmp_path / "coco" / "train2017" / f"{2:012d}.jpg", photograph(0, (41, 30)))
    with pytest.raises(DataError, match="is 41x30 pixels, its annotation says 40x30"):
        read_record(list_records(COCO, str(tmp_path)).records[1])
    write(tmp_path / "coco.json", {**coco_tree(), "images": [], "annotations": []})
    with pytest.raises(DataError, match="no usable sample"):
        list_records(COCO, str(tmp_path))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("images", {"id": 2}, "id 2 is given twice"),
        ("annotations", {"id": 3}, "id 3 is given twice"),
        ("annotations", {"category_id": 12}, "12 is none of the 2 categories; .* 1 .person"),
        ("annotations", {"image_id": 99}, "image_id 99 is none of the file's images"),
    ],
)
def test_ids_that_cannot_be_are_refused(
    tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    tree = coco_tree()
    tree[part][0].update(change)
    write_coco(tmp_path)
    write(tmp_path / "coco.json", tree)
    with pytest.raises(DataError, match=message):
        list_records(COCO, str(tmp_path))


def prepared(source: Source, root: Path, shards: Path) -> Index:
    data = data_of(root, source, shards=str(shards), bad_sample_budget=0)
    return prepare_source(source, data, in_line)


@pytest.mark.parametrize(
    ("folder", "split", "counts"),
    [
        # Images, annotations, crowds, images with an annotation: PROVENANCE.md, and for the crowds
        # and images of tiny_coco, which it does not count, a loop over the json.
        ("coco128", "train2017", (128, 939, 10, 126)),
        ("tiny_coco", "train2017", (50, 470, 5, 49)),
        ("tiny_coco", "val2017", (50, 382, 5, 48)),
    ],
)
def test_real_coco(
    tmp_path: Path, shared_data: Path, folder: str, split: str, counts: tuple[int, int, int, int]
) -> None:
    if not (shared_data / folder).is_dir():
        pytest.skip(f"no {folder} among the real sample data")
    annotations = f"{folder}/annotations/instances_{split}.json"
    source = Source(name="real", format="coco", images=folder, annotations=annotations)
    index = prepared(source, shared_data, tmp_path)
    images, total, crowds, annotated = counts
    assert len(index) == images and index.report["unreadable"] == []
    assert index.report["dropped"] == {CROWD: crowds}
    samples = [index.read(i) for i in range(images)]
    assert sum(len(sample.boxes) for sample in samples) == total - crowds
    # An image whose only annotation is a crowd has one in the file and none here.
    tree = json.loads((shared_data / annotations).read_text())
    assert len({entry["image_id"] for entry in tree["annotations"]}) == annotated
    usable = {entry["image_id"] for entry in tree["annotations"] if not entry["iscrowd"]}
    assert {sample.image_id for sample in samples if len(sample.boxes)} == usable
    whole = list_records(source.model_copy(update={"keep_flagged": True}), str(shared_data))
    assert num_boxes(whole) == total and whole.dropped == {}


def num_boxes(record_set: RecordSet) -> int:
    return sum(len(record.category_ids) for record in record_set.records)


@pytest.mark.parametrize(
    ("annotations", "counts"),
    [
        # Images, annotations, categories in use, negatives, not exhaustive, categories: PROVENANCE.
        ("lvis/lvis_val_100.json", (100, 977, 190, 942, 16, 1230)),
        ("derived/lvis_v0.5_val_9.json", (9, 100, 35, 85, 5, 1230)),
        # PROVENANCE counts 942 f + 35 c annotations and 172 f + 18 c categories of the 100, and
        # 99 + 1, 34 + 1 of the 9. Negatives of the 79 v0.5 categories that v1 lacks are not in it;
        # they are counted in the file itself, below.
        ("derived/lvis_val_100_as_v1_categories.json", (100, 977, 190, None, None, 1203)),
        ("derived/lvis_val_9_as_v1_categories.json", (9, 100, 35, None, None, 1203)),
    ],
)
def test_real_lvis_of_both_versions(
    tmp_path: Path, shared_data: Path, annotations: str, counts: tuple[int | None, ...]
) -> None:
    source = Source(name="real", format="lvis", images="lvis", annotations=annotations)
    record_set = list_records(source, str(shared_data))
    records = record_set.records
    images, total, used, negative, partial, categories = counts
    tree = json.loads((shared_data / annotations).read_text())
    if negative is None:
        negative = sum(len(image["neg_category_ids"]) for image in tree["images"])
        partial = sum(len(image["not_exhaustive_category_ids"]) for image in tree["images"])
    assert record_set.dropped == {} and record_set.vocabulary.num_categories == categories
    assert len(records) == images and num_boxes(record_set) == total
    assert len(np.unique(np.concatenate([record.category_ids for record in records]))) == used
    assert sum(len(record.negative_category_ids) for record in records) == negative
    assert sum(len(record.not_exhaustive_category_ids) for record in records) == partial
    # 9 photographs are there, whatever the file lists; the others are unreadable, within a budget.
    data = data_of(shared_data, source, shards=str(tmp_path), bad_sample_budget=91)
    index = prepare_source(source, data, in_line)
    assert len(index) == 9 and len(index.report["unreadable"]) == (images or 0) - 9
    assert sum(len(index.read(i).boxes) for i in range(9)) == 100


def test_real_minival_by_file_name_only(shared_data: Path, tmp_path: Path) -> None:
    """A part of val whose images have names instead of addresses, as GLIP's minival file has."""
    tree = json.loads((shared_data / "derived/lvis_val_9_as_v1_categories.json").read_text())
    tree["images"] = tree["images"][:4]
    chosen = {image["id"] for image in tree["images"]}
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in chosen]
    for image in tree["images"]:
        image["file_name"] = f"val2017/{image['id']:012d}.jpg"
        image.pop("coco_url")
    write(tmp_path / "minival.json", tree)
    source = Source(
        name="minival",
        format="lvis",
        images="lvis",
        annotations=str(tmp_path / "minival.json"),
    )
    record_set = list_records(source, str(shared_data))
    assert [record.num_bytes is None for record in record_set.records] == [False] * 4
    assert num_boxes(record_set) == len(tree["annotations"]) > 0


def test_real_objects365_records(shared_data: Path, tmp_path: Path) -> None:
    """The transcribed records: three images, two of known size; seven boxes, five given by corners.

    The third image's size was not transcribed: 501 x 500 holds its boxes. Names of categories that
    the transcription lacks are Detic's list of the 365.
    """
    tree = json.loads((shared_data / "objects365/records_transcribed.json").read_text())
    assert (len(tree["images"]), len(tree["annotations"])) == (3, 2)
    names = (shared_data / "detic_metadata/Objects365_names_fix.csv").read_text().splitlines()
    tree["categories"] = [
        {"id": int(row.split(",")[0]), "name": row.split(",")[1]} for row in names
    ]
    tree["images"][2] |= {"width": 501, "height": 500}
    corners = tree.pop("boxes_xyxy_of_900001")
    for entry in corners:
        x0, y0, x1, y1 = entry["bbox"]
        tree["annotations"].append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    write(tmp_path / "objects365.json", tree)
    for image in tree["images"]:
        size = (image["width"], image["height"])
        patch = Path(image["file_name"]).parent.name or "patch3"
        name = Path(image["file_name"]).name
        write(tmp_path / "objects365" / (patch if "/" in image["file_name"] else "") / name,
              photograph(size=size))  # fmt: skip
    index = prepared(OBJECTS365, tmp_path, tmp_path / "shards")
    assert len(index) == 3 and index.report["dropped"] == {}
    samples = {sample.image_id: sample for sample in map(index.read, range(3))}
    assert sum(len(sample.boxes) for sample in samples.values()) == 7
    assert samples[900001].category_ids.tolist() == [1, 33, 1, 33, 80]
    np.testing.assert_allclose(
        samples[900001].boxes, [entry["bbox"] for entry in corners], atol=1e-4
    )
    names_of = dict(zip(index.vocabulary.ids, index.vocabulary.names, strict=True))
    for entry in corners:
        assert names_of[entry["category_id"]] == entry["category_name"]
    with pytest.raises(DataError, match="looks like Objects365"):
        list_records(COCO.model_copy(update={"annotations": "objects365.json"}), str(tmp_path))


def test_writing_lvis_still_needs_its_lists(tmp_path: Path) -> None:
    tree = lvis_tree(2)
    tree["images"][1].pop("neg_category_ids")
    write_lvis(tmp_path, tree)
    with pytest.raises(DataError, match="image 11: `neg_category_ids` must be a list"):
        list_records(LVIS, str(tmp_path))
