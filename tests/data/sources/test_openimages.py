"""OpenImages: csv of boxes, verified labels, the hierarchy; generated, and of real photographs."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from faulty_server import serve
from PIL import Image
from raw_data import data_of, in_line, photograph, write

from pipeline.data.sample import UNLABELLED
from pipeline.data.shards.ground_truth import load_ground_truth
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.sources import csv_columns, list_records, read_record
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source
from pipeline.recipe.data import SourceFiles

FILES = {
    "classes": "classes.csv",
    "image_labels": "labels.csv",
    "hierarchy": "hierarchy.json",
}
OPENIMAGES = Source.model_validate(
    {
        "name": "openimages",
        "format": "openimages",
        "images": "train",
        "annotations": "boxes.csv",
        "files": FILES,
    }
)
CLASSES = [
    ("/m/0k4j", "Car"),
    ("/m/07yv9", "Vehicle"),
    ("/m/0199g", "Bicycle"),
    ("/m/0c_jw", "Furniture"),
    ("/m/01mzpv", "Chair"),
    ("/m/0dzct", "Human face"),
]
CAR, VEHICLE, BICYCLE, FURNITURE, CHAIR, FACE = (mid for mid, _ in CLASSES)
IDS = {mid: k for k, (mid, _) in enumerate(CLASSES, start=1)}
HIERARCHY = {
    "LabelName": "/m/0bl9f",
    "Subcategory": [
        {
            "LabelName": VEHICLE,
            "Subcategory": [{"LabelName": "/m/01prls", "Subcategory": [{"LabelName": CAR}]},
                            {"LabelName": BICYCLE, "Part": [{"LabelName": "/m/083wq"}]}],
            "Part": [{"LabelName": FACE}],
        },
        {"LabelName": FURNITURE, "Subcategory": [{"LabelName": CHAIR}]},
        {"LabelName": FACE},
    ],
}  # fmt: skip
HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
A, B, C, D = (f"{digit}" * 16 for digit in "0af3")
GROUP = "box around a group, left out"

Row = tuple[str, str, tuple[float, float, float, float], int]


def box_csv(rows: list[Row], header: str = HEADER) -> str:
    """Boxes as XMin, XMax, YMin, YMax, in the published order."""
    lines = [
        f"{image},xclick,{mid},1,{','.join(str(v) for v in box)},0,0,{group},0,0"
        for image, mid, box, group in rows
    ]
    return "\n".join([header, *lines]) + "\n"


def label_csv(rows: list[tuple[str, str, object]]) -> str:
    lines = [f"{image},verification,{mid},{confidence}" for image, mid, confidence in rows]
    return "\n".join(["ImageID,Source,LabelName,Confidence", *lines]) + "\n"


ROWS: list[Row] = [
    (B, CAR, (0.25, 0.5, 0.1, 0.2), 0),
    (A, BICYCLE, (0, 1, 0, 1), 0),
    (B, CAR, (0.25, 0.5, 0.1, 0.2), 0),  # the same again
    (B, FACE, (0.25, 0.5, 0.1, 0.2), 0),  # the same place, another thing
    (B, CHAIR, (0, 0.9, 0, 0.9), 1),  # a group
    (B, CAR, (-0.1, 0.5, 0, 0.5), 0),  # partly outside
    (B, CAR, (0.3, 0.3, 0, 0.5), 0),  # empty
    (B, CAR, (0.999999, 1.000001, 0, 0.5), -1),  # rounded; nobody knows whether a group
]


def write_openimages(
    root: Path,
    boxes: str | None = None,
    labels: str | None = None,
    images: tuple[str, ...] = (A, B),
) -> None:
    write(root / "classes.csv", "\n".join(",".join(row) for row in CLASSES) + "\n")
    write(root / "hierarchy.json", HIERARCHY)
    write(root / "boxes.csv", box_csv(ROWS) if boxes is None else boxes)
    write(root / "labels.csv", label_csv([]) if labels is None else labels)
    for image in images:
        write(root / "train" / f"{image}.jpg", photograph())


def without(*keys: str, **changes: object) -> Source:
    files = OPENIMAGES.files.model_copy(update=dict.fromkeys(keys))
    return OPENIMAGES.model_copy(update={"files": files, **changes})


def test_boxes_are_fractions_of_images_of_any_size(tmp_path: Path) -> None:
    write_openimages(tmp_path)
    record_set = list_records(without("image_labels", "hierarchy"), str(tmp_path))
    first, second = record_set.records
    assert (first.key, second.key) == (A, B)
    assert first.boxes is not None and second.boxes is not None and first.relative_boxes
    assert first.boxes.tolist() == [[0, 0, 1, 1]] and first.category_ids.tolist() == [3]
    expected = [[0.25, 0.1, 0.5, 0.2], [0, 0, 0.5, 0.5], [0.999999, 0, 1, 0.5]]
    assert second.category_ids.tolist() == [1, 1, 1, 6]
    np.testing.assert_allclose(second.boxes, [*expected, [0.25, 0.1, 0.5, 0.2]], atol=1e-7)
    assert record_set.dropped == {
        "box given twice, left out": 1,
        GROUP: 1,
        "box empty or wholly outside the image, left out": 1,
        "box partly outside the image, clipped": 1,
    }
    assert B in record_set.examples[GROUP][0]
    assert second.negative_category_ids == ()
    assert second.not_exhaustive_category_ids == (IDS[CHAIR],)
    sample = read_record(second)
    assert (sample.width, sample.height) == (40, 30)
    np.testing.assert_allclose(sample.boxes[0], [10, 3, 20, 6], atol=1e-5)
    assert record_set.vocabulary.categories[0].aliases == (CAR,)
    unlabelled = list_records(without("hierarchy", use_labels=False), str(tmp_path)).records[1]
    assert unlabelled.category_ids.tolist() == [UNLABELLED] * 4
    assert unlabelled.not_exhaustive_category_ids == ()


def test_groups_are_ordinary_boxes_when_the_recipe_keeps_them(tmp_path: Path) -> None:
    write_openimages(tmp_path)
    source = without("image_labels", "hierarchy", keep_flagged=True)
    record_set = list_records(source, str(tmp_path))
    assert IDS[CHAIR] in record_set.records[1].category_ids
    assert record_set.records[1].not_exhaustive_category_ids == ()
    assert GROUP not in record_set.dropped


def test_records_are_a_sequence_of_small_records(tmp_path: Path) -> None:
    write_openimages(tmp_path)
    records = list_records(OPENIMAGES, str(tmp_path)).records
    assert [record.key for record in records] == [records[0].key, records[-1].key] == [A, B]
    assert [record.key for record in records[::-1]] == [B, A]
    with pytest.raises(IndexError):
        records[2]
    assert len(pickle.dumps(records[1])) < 1500


LABELS: list[tuple[str, str, object]] = [
    (B, FURNITURE, 0),  # contradicted by a group of chairs
    (B, BICYCLE, 0),
    (B, "/m/unboxed", 1),
    (A, VEHICLE, 0),  # contradicted by a bicycle
    (A, FACE, 1),  # present, and not boxed
    (A, FURNITURE, 0),
    (C, CAR, 1),  # of an image without boxes
    (D, CAR, 0),  # of an image that is not there
]


def test_verified_labels_tell_what_is_absent_and_what_is_not_exhaustive(tmp_path: Path) -> None:
    write_openimages(tmp_path, labels=label_csv(LABELS), images=(A, B, C))
    record_set = list_records(without("hierarchy"), str(tmp_path))
    assert [record.key for record in record_set.records] == [A, B, C]
    a, b, c = (
        (record.negative_category_ids, record.not_exhaustive_category_ids)
        for record in record_set.records
    )
    # Without the hierarchy a vehicle may be absent where a bicycle is.
    assert a == ((IDS[VEHICLE], IDS[FURNITURE]), (IDS[FACE],))
    assert b == ((IDS[BICYCLE], IDS[FURNITURE]), (IDS[CHAIR],))
    assert c == ((), (IDS[CAR],))
    assert record_set.records[2].category_ids.tolist() == []
    assert record_set.dropped["image label of a class without boxes, left out"] == 1
    reason = "image with verified labels, without a box, not in `images`, left out"
    assert record_set.dropped[reason] == 1 and D in record_set.examples[reason][0]


def test_absence_goes_down_the_hierarchy_and_presence_up(tmp_path: Path) -> None:
    write_openimages(tmp_path, labels=label_csv(LABELS), images=(A, B, C))
    record_set = list_records(OPENIMAGES, str(tmp_path))
    a, b, c = (
        (set(record.negative_category_ids), set(record.not_exhaustive_category_ids))
        for record in record_set.records
    )
    # No furniture: no chair. A bicycle is a vehicle, whatever the label says; it is boxed as a
    # bicycle only. A part (the face of a vehicle) is no kind.
    assert a == ({IDS[FURNITURE], IDS[CHAIR]}, {IDS[FACE], IDS[VEHICLE]})
    assert b == ({IDS[BICYCLE]}, {IDS[CHAIR], IDS[FURNITURE], IDS[VEHICLE]})
    assert c == (set(), {IDS[CAR], IDS[VEHICLE]})
    reason = "label verified absent, with a box or label to the contrary, left out"
    assert record_set.dropped[reason] == 2
    assert f"{A}: {VEHICLE}" in " ".join(record_set.examples[reason])


def test_images_lie_in_the_folder_of_the_split_or_of_its_archives(tmp_path: Path) -> None:
    write_openimages(tmp_path, images=())
    source = without("image_labels", "hierarchy")
    write(tmp_path / "train" / "train_0" / f"{A}.jpg", photograph())
    write(tmp_path / "train" / "train_f" / f"{B}.jpg", photograph())  # not of this archive
    first, second = list_records(source, str(tmp_path)).records
    assert first.path == str(tmp_path / "train" / "train_0" / f"{A}.jpg")
    assert second.num_bytes is None
    with pytest.raises(DataError, match="does not exist"):
        read_record(second)
    write(tmp_path / "train" / "train_a" / f"{B}.jpg", photograph())
    assert list_records(source, str(tmp_path)).records[1].num_bytes is not None
    (tmp_path / "train" / "train_0" / f"{A}.jpg").rename(tmp_path / "train" / f"{A}.jpg")
    above = list_records(source.model_copy(update={"images": "."}), str(tmp_path))
    assert above.records[0].path == str(tmp_path / "train" / f"{A}.jpg")


def line(**changes: str) -> str:
    values = dict(zip(HEADER.split(","), f"{A},xclick,{CAR},1,0,1,0,1,0,0,0,0,0".split(","),
                      strict=True)) | changes  # fmt: skip
    return f"{HEADER}\n{','.join(values.values())}\n"


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (line(ImageID="12"), r"line 2: ImageID '12' must be 16 hexadecimal digits"),
        (line(ImageID="0x00000000000000"), "must be 16 hexadecimal digits"),
        (line(LabelName="/m/none"), r"line 2: LabelName is none of `files\.classes`.*/m/none"),
        (line(XMin="x"), "line 2: XMin 'x' must be a finite number"),
        (line(YMax="nan"), "line 2: YMax 'nan' must be a finite number"),
        (line(XMin="0.5", XMax="0.4"), "line 2: XMin and YMin must not be above"),
        (line(IsGroupOf="2"), "line 2: IsGroupOf must be 1, 0, or -1"),
        (line() + f"{A},xclick,{CAR},1,0,1\n", "line 3: 6 values, and the header has 13"),
        (HEADER.replace("XMin", "xmin") + "\n", "the header lacks XMin .*`annotations` is a csv"),
        ('{"images": []}', "the header lacks ImageID"),
        (f'{{"a": "{"x" * 200_000}"}}', "not a csv"),
        (f'{{"a": [{"1," * (3 << 20)}1]}}', "a line of more than 1048576 bytes"),
        (HEADER + "\n", "no usable sample"),
        ("", "no usable sample"),
    ],
)
def test_bad_rows_are_refused_with_line_and_rule(tmp_path: Path, boxes: str, message: str) -> None:
    write_openimages(tmp_path, boxes)
    with pytest.raises(DataError, match=message):
        list_records(without("image_labels", "hierarchy"), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.csv", label_csv([(A, CAR, 0.7)]), "line 2: Confidence 0.7 must be 1 or 0"),
        ("classes.csv", "Car,/m/0k4j\n", "line 1: 'Car,/m/0k4j' must be a LabelName"),
        ("classes.csv", f"{CAR},Car\n{CAR},Auto\n", "line 2: /m/0k4j is given twice"),
        ("classes.csv", f'["{"x" * 200_000}"]', "not a csv"),
        ("classes.csv", "".join(f"/m/{k},c{k}\n" for k in range(1001)), "1001 classes"),
        ("hierarchy.json", "[]", "no list `Subcategory` at its root"),
        ("hierarchy.json", '{"LabelName": "a", "Subcategory": [3]}', "an entry has no LabelName"),
        ("hierarchy.json", "{", "not valid json"),
    ],
)
def test_further_files_that_cannot_be_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    write_openimages(tmp_path)
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        list_records(OPENIMAGES, str(tmp_path))


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("boxes.csv", "annotations"),
        ("labels.csv", r"files\.image_labels"),
        ("classes.csv", r"files\.classes"),
        ("hierarchy.json", r"files\.hierarchy"),
    ],
)
def test_missing_files_are_named_with_their_key(tmp_path: Path, file: str, key: str) -> None:
    write_openimages(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(RecipeError, match=f"openimages: `{key}`"):
        list_records(OPENIMAGES, str(tmp_path))


def test_without_any_image_the_recipe_is_wrong(tmp_path: Path) -> None:
    write_openimages(tmp_path, images=(C,))
    with pytest.raises(RecipeError, match=f"none of the 2 images .* {A}.jpg"):
        list_records(OPENIMAGES, str(tmp_path))


@pytest.mark.parametrize("block", [1, 100, 1000])
def test_blocks_of_any_size_give_the_same_records(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = box_csv(ROWS).replace("\n", "\r\n").rstrip("\r\n")
    write_openimages(tmp_path, labels=label_csv(LABELS))
    whole = list_records(OPENIMAGES, str(tmp_path))
    write(tmp_path / "boxes.csv", b"\xef\xbb\xbf" + text.encode())
    monkeypatch.setattr(csv_columns, "_BLOCK", block)
    again = list_records(OPENIMAGES, str(tmp_path))
    assert again.dropped == whole.dropped
    for one, other in zip(whole.records, again.records, strict=True):
        assert pickle.dumps(one) == pickle.dumps(other)
    write(tmp_path / "boxes.csv", text + f"\r\n{A},xclick,{CAR},1,0,1,0,x,0,0,0,0,0\r\n")
    with pytest.raises(DataError, match=f"line {len(ROWS) + 2}: YMax 'x'"):
        list_records(OPENIMAGES, str(tmp_path))


@pytest.mark.parametrize("says_size", [True, False])
def test_a_web_server_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_size: bool
) -> None:
    """Its listings have no sizes, if it lists at all; some do not tell a file's size either."""
    write_openimages(tmp_path)
    local = list_records(OPENIMAGES, str(tmp_path))
    if not says_size:
        monkeypatch.setattr(csv_columns, "file_size", lambda url: None)
    monkeypatch.setattr(csv_columns, "_BLOCK", 100)
    with serve(tmp_path) as server:
        source = OPENIMAGES.model_copy(
            update={
                "annotations": f"{server.url}/boxes.csv",
                "files": SourceFiles(classes=f"{server.url}/classes.csv"),
            }
        )
        again = list_records(source, str(tmp_path))
        assert [r.boxes.tolist() for r in again.records] == [
            r.boxes.tolist() for r in local.records
        ]
        (tmp_path / "boxes.csv").unlink()
        with pytest.raises(RecipeError, match="`annotations` is no file"):
            list_records(source, str(tmp_path))


def test_real_fish(tmp_path: Path, shared_data: Path) -> None:
    """40 photographs, 113 objects (PROVENANCE), all of class Fish.

    The sample has the boxes as OIDv4's txt, in pixels: class, then x0, y0, x1, y1. The published
    form is written here from them, with the real sizes, classes and hierarchy.
    """
    folder = shared_data / "openimages"
    rows: list[Row] = []
    corners: dict[str, list[list[float]]] = {}
    fish = "/m/0ch_cf"
    for path in sorted((folder / "fish_train").glob("*.txt")):
        with Image.open(path.with_suffix(".jpg")) as image:
            width, height = image.size
        for entry in path.read_text().splitlines():
            name, *values = entry.split()
            assert name == "Fish"
            x0, y0, x1, y1 = map(float, values)
            corners.setdefault(path.stem, []).append([x0, y0, x1, y1])
            rows.append((path.stem, fish, (x0 / width, x1 / width, y0 / height, y1 / height), 0))
    write(tmp_path / "boxes.csv", box_csv(rows))
    first = next(iter(corners))
    animal, vehicle = "/m/0jbk", "/m/07yv9"
    write(tmp_path / "labels.csv", label_csv([(first, fish, 1), (first, vehicle, 0)]))
    source = Source.model_validate(
        {
            "name": "fish",
            "format": "openimages",
            "images": str(folder / "fish_train"),
            "annotations": "boxes.csv",
            "files": {
                "classes": str(folder / "class-descriptions-boxable.csv"),
                "hierarchy": str(folder / "bbox_labels_600_hierarchy.json"),
                "image_labels": "labels.csv",
            },
        }
    )
    data = data_of(tmp_path, source, bad_sample_budget=0)
    index = prepare_source(source, data, in_line, evaluated=True)
    assert len(index) == 40 and index.report["dropped"] == {}
    samples = {sample.key: sample for sample in map(index.read, range(40))}
    assert sum(len(sample.boxes) for sample in samples.values()) == 113
    for key, expected in corners.items():
        found = sorted(samples[key].boxes.tolist())
        np.testing.assert_allclose(found, sorted(expected), atol=1e-3)
        assert set(samples[key].category_ids.tolist()) == {463}
    truth = load_ground_truth(index)
    keys = {image["id"]: image["file_name"].removesuffix(".jpg") for image in truth["images"]}
    for key, expected in corners.items():
        boxes = [row["bbox"] for row in truth["annotations"] if keys[row["image_id"]] == key]
        found = sorted([x, y, x + w, y + h] for x, y, w, h in boxes)
        np.testing.assert_allclose(found, sorted(expected), atol=1e-3)
    # The line number of Fish in the published file is 463.
    names = dict(zip(index.vocabulary.ids, index.vocabulary.names, strict=True))
    assert len(names) == 601 and names[463] == "Fish"
    number = {c.aliases[0]: c.id for c in index.vocabulary.categories}
    assert all(s.not_exhaustive_category_ids == (number[animal],) for s in samples.values())
    kinds = kinds_of(json.loads((folder / "bbox_labels_600_hierarchy.json").read_text()), vehicle)
    assert len(kinds) > 20 and number[vehicle] in samples[first].negative_category_ids
    assert set(samples[first].negative_category_ids) == {number[kind] for kind in kinds}
    assert all(s.negative_category_ids == () for k, s in samples.items() if k != first)


def kinds_of(node: dict, name: str, inside: bool = False) -> set[str]:
    """A class and all below it, by walking down from the root."""
    inside = inside or node["LabelName"] == name
    below = [kinds_of(child, name, inside) for child in node.get("Subcategory", [])]
    return set().union(*below) | ({node["LabelName"]} if inside else set())
