"""Pascal VOC: generated xml, hostile xml, and the real devkit."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from raw_data import data_of, in_line, photograph, write

from pipeline.data.shards.index import Index
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.sources import list_records, read_record
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

VOC = Source(
    name="voc",
    format="voc",
    images="VOC2012/JPEGImages",
    annotations="VOC2012/ImageSets/Main/train.txt",
)
DIFFICULT = "object marked difficult, left out"
NAME = "2008_000008"


def thing(
    box: tuple[float, float, float, float] = (1, 1, 40, 30), name: str = "dog", more: str = ""
) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def annotation(*things: str, name: str = NAME, size: tuple[int, int] = (40, 30)) -> str:
    return (
        f"<annotation><filename>{name}.jpg</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size>{''.join(things)}</annotation>"
    )


def write_voc(root: Path, xml: str | bytes | None = None, split: str = f"{NAME}\n") -> None:
    devkit = root / "VOC2012"
    write(devkit / "ImageSets" / "Main" / "train.txt", split)
    write(devkit / "JPEGImages" / f"{NAME}.jpg", photograph())
    if xml is not None:
        write(devkit / "Annotations" / f"{NAME}.xml", xml)


def test_pixels_count_from_one_and_include_both_ends(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin></bndbox></part>"
    write_voc(
        tmp_path,
        annotation(
            thing(),
            thing((1, 1, 1, 1), "tvmonitor"),
            thing((2.5, 3, 45, 30), "aeroplane", part),
        ),
    )
    record_set = list_records(VOC, str(tmp_path))
    (record,) = record_set.records
    assert record.boxes is not None
    # The whole image; its first pixel; one box of fractions, of which five pixels are outside.
    assert record.boxes.tolist() == [[0, 0, 40, 30], [0, 0, 1, 1], [1.5, 2, 40, 30]]
    assert record.category_ids.tolist() == [12, 20, 1]
    assert record_set.dropped == {"box partly outside the image, clipped": 1}
    assert (record.key, record.image_id) == (NAME, 2008000008)
    assert record.declared_size == (40, 30)
    names = record_set.vocabulary.names
    assert (len(names), names[0], names[14], names[19]) == (20, "aeroplane", "person", "tvmonitor")
    assert record_set.vocabulary.ids == list(range(1, 21))


def test_difficult_objects_are_left_out_unless_they_are_kept(tmp_path: Path) -> None:
    easy, hard = "<difficult>0</difficult>", "<difficult>1</difficult>"
    write_voc(tmp_path, annotation(thing(more=easy), thing((1, 1, 4, 4), "cat", hard)))
    record_set = list_records(VOC, str(tmp_path))
    assert record_set.records[0].category_ids.tolist() == [12]
    assert record_set.records[0].not_exhaustive_category_ids == (8,)
    assert record_set.dropped == {DIFFICULT: 1}
    kept = list_records(VOC.model_copy(update={"keep_flagged": True}), str(tmp_path))
    assert kept.records[0].category_ids.tolist() == [12, 8] and kept.dropped == {}
    assert kept.records[0].not_exhaustive_category_ids == ()


ENTITIES = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 10 if k else "ha"}">' for k in range(12))
LAUGHS = f"<!DOCTYPE annotation [{ENTITIES}]>" + annotation(thing(name="&e11;"))
OUTSIDE = '<!DOCTYPE annotation [<!ENTITY x SYSTEM "file:///etc/hostname">]>' + annotation(
    thing(name="&x;")
)


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (LAUGHS, "DOCTYPE, which no file of VOC has"),
        (LAUGHS.encode("utf-16"), "DOCTYPE, which no file of VOC has"),
        (OUTSIDE, "DOCTYPE, which no file of VOC has"),
        ("<!DOCTYPE annotation SYSTEM 'http://127.0.0.1:9/x.dtd'>" + annotation(), "DOCTYPE"),
        (annotation(thing(name="&unknown;")), "not valid xml"),
        (annotation(thing())[:-20], "not valid xml"),
        ("", "not valid xml"),
        (b"<?xml version='1.0' encoding='nonsense'?><annotation/>", "not valid xml"),
        (" " * (1 << 20) + annotation(), "no annotation of VOC"),
        ("<html/>", "the root is <html>"),
        (annotation(name="2008_000009"), "is the annotation of another image"),
        (annotation(thing(name="Fish")), "object 1: 'Fish' is none of VOC's categories"),
        (annotation(thing((5, 5, 4, 9))), "is empty inside its image of 40x30"),
        (annotation(thing((50, 5, 54, 9))), "is empty inside its image of 40x30"),
        (annotation("<object><name>dog</name></object>"), "<bndbox/xmin> None must be a number"),
        (annotation(thing(("x", 1, 2, 3))), "<bndbox/xmin> 'x' must be"),  # type: ignore[arg-type]
        (annotation(thing((float("nan"), 1, 2, 3))), "'nan' must be a number"),
        (annotation(size=(0, 30)), "size 0x30 must be positive"),
        (None, "the annotation of an image of the split is not there"),
    ],
)
def test_bad_xml_is_refused_with_its_file(
    tmp_path: Path, xml: str | bytes | None, message: str
) -> None:
    write_voc(tmp_path, xml)
    with pytest.raises(DataError, match=message) as error:
        list_records(VOC, str(tmp_path))
    assert f"VOC2012/Annotations/{NAME}.xml" in str(error.value)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (f"{NAME} -1\n", "line 1: .* this is the split of one category"),
        (f"{NAME}\n{NAME}\n", "line 2: .* is given twice"),
        ("images/x.jpg\n", "line 1: .* must be the name of an image"),
        ("<annotation>\n", "line 1: .* must be the name of an image"),
        ('{"images": []}\n', "line 1: .* must be the name of an image"),
        ("\n", "no usable sample"),
    ],
)
def test_a_split_of_another_form_is_refused(tmp_path: Path, split: str, message: str) -> None:
    write_voc(tmp_path, annotation(), split)
    with pytest.raises(DataError, match=message):
        list_records(VOC, str(tmp_path))


def test_missing_files_and_wrong_sizes(tmp_path: Path) -> None:
    write_voc(tmp_path, annotation(size=(41, 30)))
    with pytest.raises(DataError, match="is 40x30 pixels, its annotation says 41x30"):
        read_record(list_records(VOC, str(tmp_path)).records[0])
    photo = tmp_path / "VOC2012" / "JPEGImages" / f"{NAME}.jpg"
    photo.rename(photo.with_name("other.jpg"))
    with pytest.raises(RecipeError, match="none of the 1 images"):
        list_records(VOC, str(tmp_path))
    (tmp_path / "VOC2012" / "ImageSets" / "Main" / "train.txt").unlink()
    with pytest.raises(RecipeError, match="source voc: `annotations`"):
        list_records(VOC, str(tmp_path))


def prepared(root: Path, shards: Path, year: str, split: str) -> Index:
    source = VOC.model_copy(
        update={"images": f"{year}/JPEGImages", "annotations": f"{year}/ImageSets/Main/{split}.txt"}
    )
    data = data_of(root, source, shards=str(shards), bad_sample_budget=0)
    return prepare_source(source, data, in_line)


@pytest.mark.parametrize(
    ("year", "objects", "difficult"),
    # PROVENANCE counts the five images of each year; objects were counted with grep in the xml.
    [("VOC2007", 17, 2), ("VOC2012", 11, 0)],
)
def test_real_devkit(
    tmp_path: Path, shared_data: Path, year: str, objects: int, difficult: int
) -> None:
    index = prepared(shared_data / "voc" / "VOCdevkit", tmp_path, year, "trainval")
    assert len(index) == 5 and index.report["unreadable"] == []
    assert index.report["dropped"] == ({DIFFICULT: difficult} if difficult else {})
    samples = [index.read(i) for i in range(5)]
    assert sum(len(sample.boxes) for sample in samples) == objects - difficult
    folder = shared_data / "voc" / "VOCdevkit" / year / "Annotations"
    for sample in samples:
        things = ElementTree.parse(folder / f"{sample.key}.xml").findall("object")
        easy = [thing for thing in things if thing.findtext("difficult") == "0"]
        for box, category_id, entry in zip(sample.boxes, sample.category_ids, easy, strict=True):
            corners = [float(value.text or "") for value in entry.find("bndbox") or ()]
            assert sorted(box + np.array([1, 1, 0, 0])) == sorted(corners)
            assert index.vocabulary.categories[category_id - 1].name == entry.findtext("name")


def test_real_voc_2012_and_its_coco_json(tmp_path: Path, shared_data: Path) -> None:
    """100 images, 273 objects (PROVENANCE), and the same boxes in a json that others made.

    That json counts pixels from 1 as the xml does, and has xmax - xmin for the width, so that
    x - 1, y - 1, x + width, y + height are the edges of the pixels.
    """
    sample = shared_data / "voc2012_100"
    if not sample.is_dir():
        pytest.skip("no voc2012_100 among the real sample data")
    devkit = tmp_path / "VOC2012"
    (devkit / "ImageSets" / "Main").mkdir(parents=True)
    (devkit / "Annotations").symlink_to(sample / "gts" / "pascalvoc_format")
    (devkit / "JPEGImages").symlink_to(sample / "images")
    names = sorted(path.stem for path in (devkit / "Annotations").glob("*.xml"))
    write(devkit / "ImageSets" / "Main" / "train.txt", "\n".join(names))
    index = prepared(tmp_path, tmp_path / "shards", "VOC2012", "train")
    kept = sum(len(index.read(i).boxes) for i in range(len(index)))
    # PROVENANCE does not count the difficult ones; `grep -c '<difficult>1'` finds 38.
    assert len(index) == 100 and index.report["dropped"] == {DIFFICULT: 38}
    assert kept + 38 == 273
    tree = json.loads((sample / "gts/coco_format_v1/instances_default.json").read_text())
    category = {entry["id"]: entry["name"] for entry in tree["categories"]}
    image = {entry["id"]: Path(entry["file_name"]).stem for entry in tree["images"]}
    expected = set()
    for entry in tree["annotations"]:
        x, y, width, height = entry["bbox"]
        key = (image[entry["image_id"]], category[entry["category_id"]])
        expected.add((*key, x - 1, y - 1, x + width, y + height))
    whole = list_records(VOC.model_copy(update={"keep_flagged": True}), str(tmp_path))
    found = [
        (record.key, whole.vocabulary.categories[category_id - 1].name, *box.tolist())
        for record in whole.records
        for box, category_id in zip(record.boxes, record.category_ids, strict=True)
    ]
    assert len(found) == 273 and set(found) == expected
