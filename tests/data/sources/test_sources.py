import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_data import (
    CC3M,
    IMAGENET,
    LVIS,
    OBJECTS365,
    lvis_tree,
    photograph,
    write,
    write_lvis,
)

from pipeline.data.images import decode_image
from pipeline.data.sample import UNLABELLED
from pipeline.data.sources import Record, list_records, read_record
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source


def records_of(source: Source, root: Path) -> list[Record]:
    return list(list_records(source, str(root)).records)


def test_lvis_records_hold_what_the_json_says(tmp_path: Path) -> None:
    write_lvis(tmp_path)
    record_set = list_records(LVIS, str(tmp_path))
    assert record_set.vocabulary.names == ["aerosol_can", "bow_(weapon)"]
    assert record_set.vocabulary.categories[0].aliases == ("aerosol_can", "spray_can")
    assert record_set.vocabulary.categories[0].image_count == 64
    assert record_set.dropped == {}
    empty, one, two = record_set.records
    assert [record.key for record in (empty, one, two)] == [f"{k:012d}" for k in (10, 11, 12)]
    assert empty.boxes is not None and empty.boxes.shape == (0, 4)
    assert empty.negative_category_ids == (8,) and one.not_exhaustive_category_ids == (3,)
    assert two.boxes is not None and two.boxes.dtype == np.float32
    np.testing.assert_allclose(two.boxes, [[1.25, 2.5, 11.35, 10.5], [2.25, 2.5, 12.35, 10.5]])
    assert two.category_ids.tolist() == [3, 8] and two.category_ids.dtype == np.int64
    assert not two.coarse and two.declared_size == (40, 30)
    sample = read_record(two)
    assert (sample.width, sample.height, sample.extension) == (40, 30, "jpg")
    assert sample.image == photograph(12)


def test_records_are_small_when_pickled(tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=50)
    chunk = tuple(records_of(LVIS, tmp_path))
    copy = pickle.loads(pickle.dumps(chunk))
    assert [record.key for record in copy] == [record.key for record in chunk]
    assert len(pickle.dumps(chunk)) / len(chunk) < 1500


COCO = "http://images.cocodataset.org/val2017"


@pytest.mark.parametrize(
    ("coco_url", "file_name", "on_disk", "images"),
    [
        (f"{COCO}/7.jpg", "COCO_val2014_7.jpg", "l/val2017/7.jpg", "l"),
        (f"{COCO}/7.jpg", "COCO_val2014_7.jpg", "l/7.jpg", "l"),
        (f"{COCO}/7.jpg", None, "l/val2017/7.jpg", "l/val2017"),
        (f"{COCO}/9.jpg", "7.jpg", "l/7.jpg", "l"),
        (None, "val2017/7.jpg", "l/val2017/7.jpg", "l/"),
    ],
)
def test_lvis_images_are_found_in_every_usual_place(
    tmp_path: Path, coco_url: str | None, file_name: str | None, on_disk: str, images: str
) -> None:
    tree = lvis_tree(1)
    tree["images"][0] |= {"coco_url": coco_url, "file_name": file_name}
    write(tmp_path / "lvis.json", tree)
    write(tmp_path / on_disk, photograph())
    (record,) = records_of(LVIS.model_copy(update={"images": images}), tmp_path)
    assert Path(record.path) == tmp_path / on_disk
    assert record.num_bytes == len(photograph())


def test_symbolic_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    write_lvis(tmp_path)
    (tmp_path / "lvis").rename(tmp_path / "elsewhere")
    (tmp_path / "lvis").mkdir()
    (tmp_path / "lvis" / "train2017").symlink_to(tmp_path / "elsewhere" / "train2017")
    file = tmp_path / "elsewhere" / "train2017" / f"{10:012d}.jpg"
    file.rename(tmp_path / "moved.jpg")
    file.symlink_to(tmp_path / "moved.jpg")
    assert [record.num_bytes is None for record in records_of(LVIS, tmp_path)] == [False] * 3


def test_unlabelled_sources_lose_their_category_ids(tmp_path: Path) -> None:
    write_lvis(tmp_path)
    records = records_of(LVIS.model_copy(update={"use_labels": False}), tmp_path)
    assert records[2].category_ids.tolist() == [UNLABELLED, UNLABELLED]


BAD = {
    "unknown category": (("annotations", 0, {"category_id": 9}), "nearest known id is 8"),
    "text category": (("annotations", 0, {"category_id": "3"}), "'3' must be an integer"),
    "unknown image": (("annotations", 0, {"image_id": 77}), "image_id 77 is none of"),
    "negative box": (("annotations", 0, {"bbox": [1, 1, -5, 4]}), "negative width or height"),
    "empty box": (("annotations", 0, {"bbox": [1, 1, 0, 4]}), "is empty inside its image"),
    "outside box": (("annotations", 0, {"bbox": [90, 1, 5, 4]}), "is empty inside its image"),
    "nan box": (("annotations", 0, {"bbox": [1, 1, float("nan"), 4]}), "not finite"),
    "short box": (("annotations", 0, {"bbox": [1, 1, 4]}), "must be four numbers"),
    "crowd": (("annotations", 0, {"iscrowd": 1}), "no crowd regions"),
    "duplicate annotation": (("annotations", 0, {"id": 200}), "id 200 is given twice"),
    "duplicate image": (("images", 0, {"id": 11}), "id 11 is given twice"),
    "duplicate category": (("categories", 0, {"id": 3}), "id 3 is given twice"),
    "text id": (("images", 0, {"id": "10"}), "id '10' must be an integer"),
    "no negatives": (("images", 0, {"neg_category_ids": None}), "federated protocol"),
    "unknown negative": (("images", 0, {"neg_category_ids": [4]}), "nearest known id is 3"),
    "no size": (("images", 0, {"width": 0}), "width 0 must be a positive integer"),
    "no file": (("images", 0, {"coco_url": ""}), "names no file"),
    "path out": (("images", 0, {"coco_url": "", "file_name": "../x.jpg"}), "leads out"),
    "bad frequency": (("categories", 0, {"frequency": "x"}), "must be r, c or f"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lvis_annotations_are_refused_with_file_id_and_rule(tmp_path: Path, name: str) -> None:
    (part, position, change), message = BAD[name]
    tree = lvis_tree(3)
    tree[part][position].update(change)
    write_lvis(tmp_path)
    write(tmp_path / "lvis.json", tree)
    with pytest.raises(DataError, match=message) as error:
        list_records(LVIS, str(tmp_path))
    assert "lvis.json" in str(error.value) or name == "path out"


@pytest.mark.parametrize("text", ["{", "[]", '{"images": 3}', "\xff\xfe"])
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    write_lvis(tmp_path)
    write(tmp_path / "lvis.json", text.encode("latin-1"))
    with pytest.raises(DataError, match=r"lvis\.json"):
        list_records(LVIS, str(tmp_path))


@pytest.mark.parametrize("source", [LVIS, OBJECTS365, IMAGENET, CC3M])
def test_missing_files_are_recipe_errors(tmp_path: Path, source: Source) -> None:
    with pytest.raises(RecipeError, match=f"{source.name}: `annotations`"):
        list_records(source, str(tmp_path))
    (tmp_path / "folder").mkdir()
    folder = source.model_copy(update={"annotations": "folder"})
    with pytest.raises(RecipeError, match=r"`annotations` 'folder' is no file at .*/folder"):
        list_records(folder, str(tmp_path))
    texts = {
        "lvis": json.dumps(lvis_tree()),
        "objects365": json.dumps(objects365_tree()),
        "imagenet21k": TABLE,
        "cc3m": "a cat\thttp://x.org/a.jpg\n",
    }
    write(tmp_path / "annotations", texts[source.format])
    absent = {"annotations": "annotations", "images": "nowhere"}
    with pytest.raises(RecipeError, match=f"{source.name}: `images` 'nowhere'"):
        list_records(source.model_copy(update=absent), str(tmp_path))


def test_no_image_at_all_is_a_recipe_error_and_some_are_not(tmp_path: Path) -> None:
    write_lvis(tmp_path)
    files = sorted((tmp_path / "lvis" / "train2017").iterdir())
    files[0].unlink()
    first = records_of(LVIS, tmp_path)[0]
    assert first.num_bytes is None
    with pytest.raises(DataError, match="does not exist"):
        read_record(first)
    for file in files[1:]:
        file.rename(tmp_path / "lvis" / f"other_{file.name}")
    with pytest.raises(RecipeError, match="none of the 3 images"):
        list_records(LVIS, str(tmp_path))


def test_boxes_partly_outside_are_clipped_and_counted(tmp_path: Path) -> None:
    tree = lvis_tree(3)
    tree["annotations"][0]["bbox"] = [-5, 25, 20, 30]
    tree["annotations"][1]["bbox"] = [0, 0, 40.005, 30]
    write_lvis(tmp_path, tree)
    record_set = list_records(LVIS, str(tmp_path))
    assert record_set.dropped == {"box partly outside the image, clipped": 1}
    (example,) = record_set.examples["box partly outside the image, clipped"]
    assert "annotation 100 of image 11" in example
    assert record_set.records[1].boxes is not None and record_set.records[2].boxes is not None
    assert record_set.records[1].boxes.tolist() == [[0, 25, 15, 30]]
    assert record_set.records[2].boxes[0].tolist() == [0, 0, 40, 30]


def objects365_tree() -> dict[str, list[dict]]:
    boxes = [
        ([1, 2, 5, 6], {}),
        ([1, 2, 5, 6], {}),  # the same again
        ([1, 2, 5, 6], {"category_id": 2}),  # the same place, another thing
        ([3, 3, 4, 4], {"iscrowd": 1}),
        ([50, 3, 4, 4], {}),  # wholly outside
        ([5, 5, 0, 4], {}),  # empty
        ([30, 20, 20, 20], {"isfake": 1}),  # partly outside
    ]
    return {
        "categories": [{"id": 1, "name": "Person"}, {"id": 2, "name": "Wine Glass"}],
        "images": [
            {
                "id": 420917,
                "width": 40,
                "height": 30,
                "file_name": "images/v1/patch8/objects365_v1_00420917.jpg",
            }
        ],
        "annotations": [
            {"id": k, "image_id": 420917, "category_id": 1, "bbox": box, "iscrowd": 0, **more}
            for k, (box, more) in enumerate(boxes)
        ],
    }


@pytest.mark.parametrize("place", ["images/v1/patch8", "patch8", "."])
def test_objects365_leaves_out_and_counts_what_the_published_file_has(
    tmp_path: Path, place: str
) -> None:
    write(tmp_path / "objects365.json", objects365_tree())
    write(tmp_path / "objects365" / place / "objects365_v1_00420917.jpg", photograph())
    record_set = list_records(OBJECTS365, str(tmp_path))
    (record,) = record_set.records
    assert record.boxes is not None
    assert record.boxes.tolist() == [[1, 2, 6, 8], [1, 2, 6, 8], [30, 20, 40, 30]]
    assert record.category_ids.tolist() == [1, 2, 1]
    assert record_set.dropped == {
        "box given twice, left out": 1,
        "box around a crowd, left out": 1,
        "box empty or wholly outside the image, left out": 2,
        "box partly outside the image, clipped": 1,
    }
    assert read_record(record).key == "000000420917"


@pytest.mark.parametrize("box", [[1, 1, -5, 4], [1, float("inf"), 5, 4]])
def test_objects365_refuses_what_is_no_box(tmp_path: Path, box: list[float]) -> None:
    tree = objects365_tree()
    tree["annotations"][0]["bbox"] = box
    write(tmp_path / "objects365.json", tree)
    write(tmp_path / "objects365" / "objects365_v1_00420917.jpg", photograph())
    with pytest.raises(DataError, match="annotation 0"):
        list_records(OBJECTS365, str(tmp_path))


TABLE = (
    "wnid\tlvis_v1_id\tlvis_name\tlvis_synset\tlvis_frequency\trule\n"
    "n02000001\t8\tbow_(weapon)\tbow.n.04\tr\thead lemma\n"
    "n02000002\t3\taerosol_can\taerosol.n.02\tc\thead lemma\n"
    "n02000003\t3\taerosol_can\taerosol.n.02\tc\tby hand\n"
)


def test_imagenet_folders_are_coarse_whole_image_boxes(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet"
    write(folder / "wnids.tsv", TABLE)
    write(folder / "n02000001" / "n02000001_7.v2.JPEG", photograph(1, (20, 50)))
    write(folder / "n02000001" / "n02000001_7_v2.png", photograph(2, format="PNG"))
    write(folder / "n02000001" / "readme.txt", "not a picture")
    write(folder / "n02000003" / "n02000003_1.JPEG", photograph(3))
    write(folder / "n02009999" / "n02009999_1.JPEG", photograph(4))
    record_set = list_records(IMAGENET, str(tmp_path))
    assert record_set.dropped == {
        "folder whose wnid is not in the annotations, left out": 1,
        "file that is no image by its name, left out": 1,
        "wnid of the annotations without a folder or an archive": 1,
    }
    assert record_set.vocabulary.ids == [3, 8]
    assert [record.category_ids.tolist() for record in record_set.records] == [[8], [8], [3]]
    keys = [record.key for record in record_set.records]
    assert keys[0] == "n02000001_7_v2" and len(set(keys)) == 3
    assert not any("." in key for key in keys)
    samples = [read_record(record) for record in record_set.records]
    assert samples[0].boxes.tolist() == [[0, 0, 20, 50]] and samples[0].coarse
    assert samples[1].extension == "png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n02000001\t8\n", "header lacks wnid"),
        (TABLE + "n02000001\t8\tbow_(weapon)\tbow.n.04\tr\t\n", "'n02000001' is empty or given"),
        (TABLE + "n02000009\tx\tbow\t\tr\t\n", "line 5: lvis_v1_id 'x' must be an integer"),
        (TABLE + "n02000009\t3\tbow\t\tr\t\n", "category 3 is 'bow' here and 'aerosol_can'"),
        (TABLE + "n02000009\t4\tbow\t\tq\t\n", "frequency 'q' must be r, c or f"),
    ],
)
def test_bad_imagenet_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "imagenet" / "wnids.tsv", text)
    with pytest.raises(DataError, match=message):
        list_records(IMAGENET, str(tmp_path))


CAPTIONS = (
    "a cat on a mat\thttp://a.org/x/cat.jpg?w=3\n"
    "a dead link\thttp://a.org/gone.jpg\n"
    "same name\thttp://b.org/image.jpg\n"
    "same name too\thttp://c.org/image.jpg\n"
    "\thttp://c.org/silent.jpg\n"
    "line\u2028separator\tpictures/dog.png\n"
)


def test_captions_find_images_by_the_last_part_of_the_url(tmp_path: Path) -> None:
    write(tmp_path / "captions.tsv", CAPTIONS)
    for name in ("cat.jpg", "image.jpg", "silent.jpg", "dog.png"):
        write(tmp_path / "cc3m" / name, photograph())
    record_set = list_records(CC3M, str(tmp_path))
    assert [record.caption for record in record_set.records] == [
        "a cat on a mat",
        "line\u2028separator",
    ]
    assert record_set.dropped == {
        "row whose image is absent, left out": 3,
        "row without a caption, left out": 1,
    }
    assert record_set.vocabulary.num_categories == 0
    sample = read_record(record_set.records[0])
    assert sample.category_ids.tolist() == [UNLABELLED]
    assert sample.boxes.tolist() == [[0, 0, 40, 30]] and sample.coarse


def test_captions_find_images_by_row_number(tmp_path: Path) -> None:
    write(tmp_path / "captions.tsv", CAPTIONS)
    for i in (0, 2, 3, 5):
        write(tmp_path / "cc3m" / f"{i:08d}.{'png' if i == 3 else 'jpg'}", photograph(i))
    records = records_of(CC3M, tmp_path)
    assert [record.image_id for record in records] == [0, 2, 3, 5]
    assert [Path(record.path).name for record in records][2] == "00000003.png"


def test_captions_of_another_form_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "cc3m" / "cat.jpg", photograph())
    write(tmp_path / "captions.tsv", CAPTIONS + "no tab here\n")
    with pytest.raises(DataError, match=r"captions\.tsv, line 7: 'no tab here'"):
        list_records(CC3M, str(tmp_path))
    write(tmp_path / "captions.csv", "ImageID,License\n1,x\n")
    with pytest.raises(DataError, match="header lacks Title"):
        list_records(CC3M.model_copy(update={"annotations": "captions.csv"}), str(tmp_path))
    write(tmp_path / "captions.tsv", "a dog\thttp://a.org/dog.jpg\n")
    with pytest.raises(DataError, match=r"no usable sample .*absent, left out: 1"):
        list_records(CC3M, str(tmp_path))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_drawn_on_stored_pixels_turn_with_the_image(tmp_path: Path, orientation: int) -> None:
    stored = np.zeros((30, 40, 3), dtype=np.uint8)
    stored[4:12, 6:30] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "x", b"")
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    record = Record(
        key="turned",
        path=str(tmp_path / "turned.png"),
        image_id=0,
        boxes=np.array([[6, 4, 30, 12]], dtype=np.float32),
        category_ids=np.array([3]),
        declared_size=(40, 30),
    )
    sample = read_record(record)
    assert (sample.width, sample.height) == (30, 40)
    x0, y0, x1, y1 = sample.boxes[0].astype(int)
    seen = np.asarray(decode_image(sample.image))[..., 0]
    expected = np.zeros_like(seen)
    expected[y0:y1, x0:x1] = 255
    assert np.array_equal(seen, expected)


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    write_lvis(tmp_path)
    write(tmp_path / "lvis" / "train2017" / f"{12:012d}.jpg", photograph(0, (41, 30)))
    with pytest.raises(DataError, match="is 41x30 pixels, its annotation says 40x30"):
        read_record(records_of(LVIS, tmp_path)[2])


def test_an_image_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """A file of holes costs its writer nothing, and would cost memory."""
    write_lvis(tmp_path, num_images=1)
    [path] = tmp_path.rglob("*.jpg")
    os.truncate(path, 8 << 30)
    [record] = list_records(LVIS, str(tmp_path)).records
    for place in (record, replace(record, offset=0)):
        with pytest.raises(DataError, match="an image file of 8589934592 bytes, more than"):
            read_record(place)


def test_real_lvis(shared_data: Path) -> None:
    source = Source(
        name="real",
        format="lvis",
        images="lvis",
        annotations="derived/lvis_val_9_as_v1_categories.json",
    )
    record_set = list_records(source, str(shared_data))
    assert record_set.vocabulary.num_categories == 1203
    assert record_set.vocabulary.column_of(1203) == 1202
    samples = [read_record(record) for record in record_set.records]
    assert len(samples) == 9
    assert sum(len(sample.boxes) for sample in samples) == 100
    assert sum(len(sample.negative_category_ids) for sample in samples) == 84
    assert len(np.unique(np.concatenate([sample.category_ids for sample in samples]))) == 35
    for sample in samples:
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        assert (sample.boxes >= 0).all()
        assert (sample.boxes[:, 2:] <= [sample.width, sample.height]).all()


def test_real_imagenet(shared_data: Path) -> None:
    source = Source(
        name="real",
        format="imagenet21k",
        images="imagenet21k_sample",
        annotations="derived/imagenet_lvis_wnid_to_lvis_v1.tsv",
    )
    record_set = list_records(source, str(shared_data))
    assert len(record_set.records) == 235
    assert record_set.vocabulary.num_categories == 997
    assert record_set.dropped["folder whose wnid is not in the annotations, left out"] == 1
    groups = dict(zip(record_set.vocabulary.ids, record_set.vocabulary.frequencies, strict=True))
    found = {int(record.category_ids[0]) for record in record_set.records}
    assert [sum(groups[k] == group for k in found) for group in "rcf"] == [56, 79, 75]
    assert read_record(record_set.records[0]).coarse


def test_real_captions(shared_data: Path) -> None:
    folder = "conceptual_captions/test_images"
    titles = Source(name="real", format="cc3m", images=folder, annotations=f"{folder}/credits.csv")
    records = list_records(titles, str(shared_data)).records
    assert len(records) == 18
    caption = "Fireworks and Morey's Pier in North Wildwood July 2007"
    assert read_record(records[0]).caption == caption
    published = "conceptual_captions/Validation_GCC-1.1.0-Validation.tsv"
    with pytest.raises(DataError, match="absent, left out: 4000"):
        list_records(titles.model_copy(update={"annotations": published}), str(shared_data))
