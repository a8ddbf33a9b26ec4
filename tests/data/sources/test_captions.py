"""Captioned images: the published tables, WebDataset tars, and labels made of captions."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from raw_data import CC3M, data_of, in_line, lvis_tree, photograph, tar_of, write

from pipeline.data.sample import UNLABELLED
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.sources import RecordSet, list_records, read_record
from pipeline.data.sources.columns import RecordColumns
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

TARS = Source(name="cc12m", format="cc12m", images="cc12m")
ROWS = [
    ("a spray can on a bow", "http://a.org/x/0.jpg"),
    ("nothing that counts", "http://a.org/1.jpg"),
    ("two Bows!", "https://b.org/2.jpg?width=3"),
]


def triple(key: str, caption: str, seed: int = 0) -> list[tuple[str, bytes]]:
    """What img2dataset writes for an image."""
    tree = {"caption": caption, "url": f"http://x.org/{key}", "key": key, "status": "success"}
    return [
        (f"{key}.jpg", photograph(seed)),
        (f"{key}.json", json.dumps(tree).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def write_tars(root: Path) -> None:
    """Two tars of ROWS with what img2dataset puts beside them."""
    write(root / "cc12m/00000.tar", tar_of(triple("000000000", ROWS[0][0], 1)))
    rest = [*triple("000010000", ROWS[1][0], 2), *triple("000010001", ROWS[2][0], 3)]
    write(root / "cc12m/00001.tar", tar_of(rest))
    for shard in ("00000", "00001"):
        write(root / f"cc12m/{shard}.parquet", b"PAR1")
        write(root / f"cc12m/{shard}_stats.json", {"successes": 1})


def listed(source: Source, root: Path, **options: object) -> RecordSet:
    tree = source.model_dump() | options
    return list_records(Source.model_validate(tree), str(root))


def test_tars_give_images_with_captions(tmp_path: Path) -> None:
    write_tars(tmp_path)
    record_set = listed(TARS, tmp_path)
    assert record_set.dropped == {} and record_set.vocabulary.num_categories == 0
    assert isinstance(record_set.records, RecordColumns)
    samples = [read_record(record) for record in record_set.records]
    assert [s.key for s in samples] == ["00000-000000000", "00001-000010000", "00001-000010001"]
    assert [sample.caption for sample in samples] == [caption for caption, _ in ROWS]
    assert [sample.image for sample in samples] == [photograph(k) for k in (1, 2, 3)]
    assert [sample.category_ids.tolist() for sample in samples] == [[UNLABELLED]] * 3
    assert all(sample.coarse for sample in samples)
    one = listed(TARS, tmp_path, images="cc12m/00001.tar")
    assert [record.key for record in one.records] == ["00001-000010000", "00001-000010001"]


@pytest.mark.parametrize("form", ["tars", "tsv"])
@pytest.mark.parametrize("classes", ["lvis.json", "categories.json", "vocabulary.json"])
def test_captions_become_labels(tmp_path: Path, form: str, classes: str) -> None:
    tree = lvis_tree()
    write(tmp_path / "lvis.json", tree)
    write(tmp_path / "categories.json", tree["categories"])
    words = Vocabulary(
        [Category(3, "aerosol_can", aliases=("spray_can",)), Category(8, "bow_(weapon)")]
    )
    write(tmp_path / "vocabulary.json", words.to_json())
    write_tars(tmp_path)
    write(tmp_path / "captions.tsv", "".join(f"{url}\t{text}\n" for text, url in ROWS))
    for k in range(3):
        write(tmp_path / f"images/{k}.jpg", photograph(k))
    form_options = {"annotations": "captions.tsv", "images": "images"} if form == "tsv" else {}
    options = {"files": {"classes": classes}, **form_options}
    record_set = listed(TARS, tmp_path, **options)
    assert record_set.vocabulary.ids == [3, 8]
    assert [r.category_ids.tolist() for r in record_set.records] == [[3, 8], [UNLABELLED], [8]]
    assert record_set.dropped == {"caption that names no category, kept without a label": 1}
    assert list(record_set.examples.values()) == [["nothing that counts"]]
    sample = read_record(record_set.records[0])
    assert sample.boxes.tolist() == [[0, 0, 40, 30]] * 2
    unlabelled = listed(TARS, tmp_path, use_labels=False, **options)
    assert {tuple(r.category_ids.tolist()) for r in unlabelled.records} == {(UNLABELLED,)}
    assert unlabelled.dropped == {} and unlabelled.vocabulary.num_categories == 0


def test_the_recipe_knows_which_captions_have_labels(tmp_path: Path) -> None:
    labelled = Source.model_validate(TARS.model_dump() | {"files": {"classes": "x.json"}})
    assert labelled.has_labels and not TARS.has_labels and not CC3M.has_labels
    assert not labelled.model_copy(update={"use_labels": False}).has_labels
    with pytest.raises(ValueError, match="captions have no categories"):
        data_of(tmp_path, vocabulary="cc12m", extra=[TARS])


def test_labels_of_captions_reach_the_index(tmp_path: Path) -> None:
    write(tmp_path / "lvis.json", lvis_tree())
    write_tars(tmp_path)
    source = Source.model_validate(TARS.model_dump() | {"files": {"classes": "lvis.json"}})
    index = prepare_source(source, data_of(tmp_path, extra=[source]), in_line)
    assert len(index) == 3
    assert index.image_counts() == {3: 1, 8: 2}
    assert sorted(index.category_ids.tolist()) == [UNLABELLED, 3, 8, 8]
    assert {index.read(i).caption for i in range(3)} == {caption for caption, _ in ROWS}


def test_samples_that_are_not_whole_are_left_out_and_said(tmp_path: Path) -> None:
    image = photograph()
    files = [
        # Members of a sample need not stand together, and a dotted name is a name.
        ("a.jpg", image),
        ("a.b.jpg", photograph(5)),
        ("a.txt", b"of a"),
        ("a.b.txt", b" of a.b \n"),
        ("only_json.png", image),
        ("only_json.json", b'{"caption": "of the json"}'),
        ("twice.jpg", image),
        ("twice.jpg", photograph(7)),
        ("twice.txt", b"the last one"),
        ("two.jpg", image),
        ("two.png", image),
        ("two.txt", b"two"),
        ("silent.jpg", image),
        ("empty.jpg", image),
        ("empty.txt", b" \n"),
        ("latin.jpg", image),
        ("latin.txt", b"caf\xe9"),
        ("bad_json.jpg", image),
        ("bad_json.json", b"{"),
        ("null.jpg", image),
        ("null.json", b'{"caption": null}'),
        ("words.txt", b"no image"),
        ("huge.jpg", image),
        ("huge.txt", b"x" * 70_000),
        ("a.cls", b"3"),
        ("deep/a.jpg", image),
        ("deep/a.txt", b"another a"),
        ("deep_a.jpg", image),
        ("deep_a.txt", b"a key that is taken"),
    ]
    write(tmp_path / "cc12m/00000.tar", tar_of(files))
    write(tmp_path / "cc12m/readme.md", b"hello")
    record_set = listed(TARS, tmp_path)
    found = {record.key: record.caption for record in record_set.records}
    assert found == {
        "00000-a": "of a",
        "00000-a_b": "of a.b",
        "00000-only_json": "of the json",
        "00000-twice": "the last one",
        "00000-two": "two",
        "00000-deep_a": "another a",
        "00000-deep_a-3": "a key that is taken",
    }
    images = {record.key: read_record(record).image for record in record_set.records}
    assert images["00000-twice"] == photograph(7) and images["00000-a_b"] == photograph(5)
    assert record_set.dropped == {
        "file beside the tars that is none, left out": 1,
        "member given twice, the last one taken": 1,
        "second image of a sample, left out": 1,
        "caption or json of more than 65536 bytes, left out": 1,
        "member that is no image and no caption (.cls), left out": 1,
        "sample without a caption, left out": 4,
        "caption that is not UTF-8 or not json, left out": 2,
        "caption without an image, left out": 1,
    }


def test_tars_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`images` 'cc12m' is no directory"):
        listed(TARS, tmp_path)
    write(tmp_path / "cc12m/a.jpg", photograph())
    with pytest.raises(RecipeError, match="has no tar in it; without `annotations`"):
        listed(TARS, tmp_path)
    write_tars(tmp_path)
    path = tmp_path / "cc12m/00001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"00001\.tar, byte .* cut short"):
        listed(TARS, tmp_path)
    write(tmp_path / "captions.tsv", "a\thttp://x.org/b.jpg\n")
    with pytest.raises(RecipeError, match="holds tars, whose captions are inside; leave out"):
        listed(CC3M, tmp_path, images="cc12m")


@pytest.mark.parametrize(
    ("kind", "header", "url_first"),
    [
        ("cc3m", "", False),
        ("cc3m", "caption\turl\n", False),
        ("cc3m", "url\tcaption\n", True),
        ("cc12m", "", True),
        ("cc12m", "\ufeffurl\tcaption\n", True),
        ("cc12m", "caption\turl\n", False),
    ],
)
def test_tables_of_both_sets_with_and_without_header(
    tmp_path: Path, kind: str, header: str, url_first: bool
) -> None:
    rows = [(url, text) if url_first else (text, url) for text, url in ROWS]
    text = "".join(f"{left}\t{right}\n" for left, right in rows)
    write(tmp_path / "captions.tsv", header + text)
    for k in (0, 2):
        write(tmp_path / f"images/{k}.jpg", photograph(k))
    source = CC3M.model_copy(update={"format": kind, "images": "images"})
    record_set = listed(source, tmp_path)
    assert [(r.key, r.image_id, r.caption) for r in record_set.records] == [
        ("00000000", 0, ROWS[0][0]),
        ("00000002", 2, ROWS[2][0]),
    ]
    if header == "":
        other = {"cc3m": "cc12m", "cc12m": "cc3m"}[kind]
        with pytest.raises(DataError, match="urls stand where captions should"):
            listed(source, tmp_path, format=other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "line 1: '' must be a caption"),
        ("a cat\thttp://x.org/a.jpg\n\na dog\thttp://x.org/b.jpg\n", "line 2: '' must be"),
        ("a cat\t \n", "has no url or path"),
        ("a\tb\tc\n", "line 1: .* must be a caption, one tab"),
        (b"a cat\thttp://x.org/a.jpg\ncaf\xe9\thttp://x.org/b.jpg\n", "line 2: not UTF-8"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "cc3m/a.jpg", photograph())
    write(tmp_path / "captions.tsv", text)
    with pytest.raises(DataError, match=message):
        listed(CC3M, tmp_path)


def test_real_cc12m(shared_data: Path, tmp_path: Path) -> None:
    images = str(shared_data / "cc12m_webdataset")
    source = Source(name="cc12m", format="cc12m", images=images)
    record_set = list_records(source, str(tmp_path))
    assert len(record_set.records) == 32 and record_set.dropped == {}
    path = shared_data / "cc12m_webdataset" / "cc12m-train-0000.tar"
    with tarfile.open(path) as archive:
        for record in record_set.records:
            name = record.key.removeprefix("cc12m-train-0000-")
            image, tree = archive.extractfile(f"{name}.jpg"), archive.extractfile(f"{name}.json")
            assert image is not None and tree is not None
            sample, described = read_record(record), json.load(tree)
            assert sample.image == image.read()
            assert sample.caption == described["caption"]
            assert (sample.width, sample.height) == (described["width"], described["height"])
    index = prepare_source(source, data_of(tmp_path, extra=[source]), in_line)
    assert len(index) == 32 and index.report["unreadable"] == []


def test_real_labels_of_captions(shared_data: Path) -> None:
    options = {"files": {"classes": "detic_metadata/lvis_v1_train_cat_info.json"}}
    source = Source.model_validate(
        {"name": "x", "format": "cc12m", "images": "cc12m_webdataset", **options}
    )
    record_set = list_records(source, str(shared_data))
    assert record_set.vocabulary.num_categories == 1203
    names = dict(zip(record_set.vocabulary.ids, record_set.vocabulary.names, strict=True))
    found = {
        record.key[-2:]: {names.get(int(k)) for k in record.category_ids}
        for record in record_set.records
    }
    assert found["36"] == {"napkin", "pizza", "plate", "taco"}
    assert found["09"] == {None} and found["34"] == {"bulldog"}
    reason = "caption that names no category, kept without a label"
    assert record_set.dropped[reason] == sum(found[key] == {None} for key in found)


def test_real_cc3m(shared_data: Path, tmp_path: Path) -> None:
    """Every row of the real table is met, whichever of the images are there."""
    table = shared_data / "conceptual_captions" / "Validation_GCC-1.1.0-Validation.tsv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 4000
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "teal").save(buffer, "JPEG")
    for i in range(0, 4000, 40):
        write(tmp_path / f"images/{i:08d}.jpg", buffer.getvalue())
    source = Source(name="cc3m", format="cc3m", images="images", annotations=str(table))
    record_set = list_records(source, str(tmp_path))
    assert [r.caption for r in record_set.records] == [
        rows[i][0].strip() for i in range(0, 4000, 40)
    ]
    assert record_set.dropped == {"row whose image is absent, left out": 3900}


def test_real_training_rows_in_both_orders(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "conceptual_captions/sample_cc3m_annotations.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 200
    for i in range(200):
        write(tmp_path / f"images/{i:08d}.jpg", b"not read here")
    captions = []
    for kind in ("cc3m", "cc12m"):
        pairs = [(row["original_caption"], row["image_url"]) for row in rows]
        pairs = pairs if kind == "cc3m" else [(url, text) for text, url in pairs]
        write(tmp_path / f"{kind}.tsv", "".join(f"{a}\t{b}\n" for a, b in pairs))
        source = Source(name="x", format=kind, images="images", annotations=f"{kind}.tsv")
        captions.append([r.caption for r in list_records(source, str(tmp_path)).records])
    assert captions[0] == captions[1] == [row["original_caption"].strip() for row in rows]
