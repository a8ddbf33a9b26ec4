"""ImageNet-21k in every form that it is published or unpacked in: the same samples from each."""

from collections.abc import Callable
from pathlib import Path

import pytest
from raw_data import data_of, in_line, photograph, tar_of, write

from pipeline.data.sample import UNLABELLED
from pipeline.data.shards.index import Index
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.sources import RecordSet, list_records, read_record
from pipeline.data.sources.columns import RecordColumns
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

Files = list[tuple[str, bytes]]

TABLE = (
    "wnid\tlvis_v1_id\tlvis_name\tlvis_synset\tlvis_frequency\n"
    "n02000001\t8\tbow_(weapon)\tbow.n.04\tr\n"
    "n02000002\t3\taerosol_can\taerosol.n.02\tc\n"
    "n02000003\t3\taerosol_can\taerosol.n.02\tc\n"
)
WNIDS = ("n02000001", "n02000002", "n02000003")


def pictures() -> dict[str, Files]:
    """Two pictures of each wnid, in no order of their names."""
    return {
        wnid: [(f"{wnid}_{i}.JPEG", photograph(10 * k + i)) for i in (12, 7)]
        for k, wnid in enumerate(WNIDS)
    }


def as_folders(root: Path, content: dict[str, Files]) -> str:
    for wnid, files in content.items():
        for name, data in files:
            write(root / "folders" / wnid / name, data)
    return "folders"


def as_tars(root: Path, content: dict[str, Files]) -> str:
    for wnid, files in content.items():
        write(root / "tars" / f"{wnid}.tar", tar_of(files))
    return "tars"


def as_tar_of_tars(root: Path, content: dict[str, Files]) -> str:
    inner = [(f"{wnid}.tar", tar_of(files)) for wnid, files in reversed(content.items())]
    write(root / "fall11_whole.tar", tar_of(inner))
    return "fall11_whole.tar"


def as_flat_tar(root: Path, content: dict[str, Files]) -> str:
    flat = [
        (f"./imagenet21k_resized/imagenet21k_train/{wnid}/{name}", data)
        for wnid, files in content.items()
        for name, data in files
    ]
    # Members of one folder need not stand together.
    write(root / "imagenet21k_resized.tar", tar_of(flat[1::2] + flat[::2]))
    return "imagenet21k_resized.tar"


def as_processed(root: Path, content: dict[str, Files]) -> str:
    parts = ("imagenet21k_train", "imagenet21k_small_classes", "imagenet21k_val")
    for (wnid, files), part in zip(content.items(), parts * len(content), strict=False):
        for name, data in files:
            write(root / "imagenet21k_resized" / part / wnid / name, data)
    return "imagenet21k_resized"


def as_mixture(root: Path, content: dict[str, Files]) -> str:
    (first, files), *others = content.items()
    as_folders(root, {first: files})
    for wnid, some in others:
        write(root / "folders" / f"{wnid}.tar", tar_of(some))
    return "folders"


FORMS: list[Callable[[Path, dict[str, Files]], str]] = [
    as_folders,
    as_tars,
    as_tar_of_tars,
    as_flat_tar,
    as_processed,
    as_mixture,
]


def source_of(images: str, **options: object) -> Source:
    options = {"annotations": "wnids.tsv", **options}
    return Source.model_validate(
        {"name": "imagenet", "format": "imagenet21k", "images": images, **options}
    )


def listed(root: Path, images: str, **options: object) -> RecordSet:
    return list_records(source_of(images, **options), str(root))


def shards_of(root: Path, source: Source) -> tuple[Index, dict[str, str]]:
    """The index, and the sha256 of every shard."""
    data = data_of(root, source, shards=str(root / f"shards_{source.images}"), samples_per_shard=64)
    index = prepare_source(source, data, in_line)
    assert index.report["unreadable"] == []
    return index, {shard.file: shard.sha256 for shard in index.shards}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(
    tmp_path: Path, form: Callable[[Path, dict[str, Files]], str]
) -> None:
    write(tmp_path / "wnids.tsv", TABLE)
    content = pictures()
    record_set = listed(tmp_path, form(tmp_path, content))
    assert record_set.dropped == {}
    assert isinstance(record_set.records, RecordColumns)
    samples = [read_record(record) for record in record_set.records]
    assert [sample.key for sample in samples] == [f"{w}_{i}" for w in WNIDS for i in (12, 7)]
    assert [sample.image for sample in samples] == [
        data for files in content.values() for _, data in sorted(files)
    ]
    assert [sample.image_id for sample in samples] == list(range(6))
    assert [sample.category_ids.tolist() for sample in samples] == [[8]] * 2 + [[3]] * 4
    assert all(sample.coarse for sample in samples)
    assert samples[0].boxes.tolist() == [[0, 0, 40, 30]]


def test_every_form_gives_the_same_shards(tmp_path: Path) -> None:
    write(tmp_path / "wnids.tsv", TABLE)
    found = [shards_of(tmp_path, source_of(form(tmp_path, pictures()))) for form in FORMS[:5]]
    assert all(hashes == found[0][1] for _, hashes in found)
    assert len({index.digest for index, _ in found}) == 1


@pytest.mark.parametrize("form", FORMS[:4])
def test_a_wnid_that_is_not_annotated_is_left_out_unread(
    tmp_path: Path, form: Callable[[Path, dict[str, Files]], str]
) -> None:
    write(tmp_path / "wnids.tsv", "".join(TABLE.splitlines(keepends=True)[:3]))
    record_set = listed(tmp_path, form(tmp_path, pictures()))
    assert len(record_set.records) == 4
    ((reason, count),) = record_set.dropped.items()
    assert reason.endswith("whose wnid is not in the annotations, left out") and count == 1
    assert "n02000003" in record_set.examples[reason][0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("annotations", [None, "list.txt", "wnids.tsv"])
def test_without_labels_every_wnid_or_a_list_will_do(
    tmp_path: Path, form: Callable[[Path, dict[str, Files]], str], annotations: str | None
) -> None:
    write(tmp_path / "list.txt", "n02000002\nn02000001\n")
    write(tmp_path / "wnids.tsv", TABLE)
    images = form(tmp_path, pictures())
    record_set = listed(tmp_path, images, annotations=annotations, use_labels=False)
    assert len(record_set.records) == (4 if annotations == "list.txt" else 6)
    assert {tuple(r.category_ids.tolist()) for r in record_set.records} == {(UNLABELLED,)}


def test_labels_need_a_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs `annotations`, or use_labels: false"):
        source_of("folders", annotations=None)
    write(tmp_path / "list.txt", "n02000002\nn02000001\n")
    with pytest.raises(RecipeError, match="lists wnids without categories; give a tsv"):
        listed(tmp_path, as_folders(tmp_path, pictures()), annotations="list.txt")


def test_without_annotations_only_wnids_count(tmp_path: Path) -> None:
    images = as_tars(tmp_path, pictures())
    write(tmp_path / images / "_info" / "x.JPEG", photograph())
    write(tmp_path / images / "notes.tar", tar_of([]))
    record_set = listed(tmp_path, images, annotations=None, use_labels=False)
    assert len(record_set.records) == 6
    assert record_set.dropped == {
        "folder whose name is no wnid, left out": 1,
        "archive whose name is no wnid, left out": 1,
    }


def test_what_stands_beside_the_images_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "wnids.tsv", TABLE)
    images = as_tars(tmp_path, pictures())
    first = pictures()["n02000001"][0]
    again = [
        (first[0], photograph(99)),
        first,
        ("readme.txt", b"hello"),
        ("n02000001_12.v2.JPEG", photograph(5)),
        ("n02000001_12_v2.JPEG", photograph(6)),
    ]
    write(tmp_path / images / "n02000001.tar", tar_of(again))
    write(tmp_path / images / "n02000002" / "n02000002_1.JPEG", photograph(3))
    write(tmp_path / images / "n02000003.tar.gz", b"")
    write(tmp_path / images / "stray.JPEG", photograph(3))
    record_set = listed(tmp_path, images)
    assert record_set.dropped == {
        "archive of a wnid that has a folder too, left out": 1,
        "file outside of the folders by wnid, left out": 2,
        "member given twice, the last one taken": 1,
        "file that is no image by its name, left out": 1,
    }
    keys = [record.key for record in record_set.records]
    assert keys == [
        "n02000001_12",
        "n02000001_12_v2",
        "n02000001_12_v2-2",
        "n02000002_1",
        "n02000003_12",
        "n02000003_7",
    ]
    assert read_record(record_set.records[0]).image == first[1]


@pytest.mark.parametrize("name", ["winter21_whole.tar.gz", "x.tgz", "x.TAR.GZ", "x.zip"])
def test_a_compressed_archive_is_refused_with_the_command(tmp_path: Path, name: str) -> None:
    write(tmp_path / "wnids.tsv", TABLE)
    write(tmp_path / name, b"\x1f\x8b")
    with pytest.raises(RecipeError, match=f"`mkdir FOLDER && tar xf {name} -C FOLDER`"):
        listed(tmp_path, name)


def test_an_archive_that_is_absent_or_damaged_is_named(tmp_path: Path) -> None:
    write(tmp_path / "wnids.tsv", TABLE)
    with pytest.raises(RecipeError, match=r"`images` 'fall11_whole\.tar' is no archive at"):
        listed(tmp_path, "fall11_whole.tar")
    images = as_tars(tmp_path, pictures())
    path = tmp_path / images / "n02000002.tar"
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(DataError, match=r"n02000002\.tar, byte .* cut short"):
        listed(tmp_path, images)
    inner = tar_of(pictures()["n02000002"])[:-9000]
    write(tmp_path / "whole.tar", tar_of([("n02000002.tar", inner)]))
    with pytest.raises(DataError, match=r"whole\.tar, byte .* \(the archive inside it from byte"):
        listed(tmp_path, "whole.tar")


def real_source(images: str) -> Source:
    return source_of(images, annotations="wnids.tsv")


def test_real_photographs_in_every_form(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "imagenet21k_sample"
    table = shared_data / "derived" / "imagenet_lvis_wnid_to_lvis_v1.tsv"
    write(tmp_path / "wnids.tsv", table.read_bytes())
    content = {
        path.name: [(file.name, file.read_bytes()) for file in path.iterdir()]
        for path in folder.iterdir()
        if path.name.startswith("n")
    }
    assert len(content) == 210
    found = {}
    for form in FORMS[:4]:
        source = real_source(form(tmp_path, content))
        record_set = list_records(source, str(tmp_path))
        assert len(record_set.records) == 235
        assert record_set.dropped == {"wnid of the annotations without a folder or an archive": 787}
        groups = dict(
            zip(record_set.vocabulary.ids, record_set.vocabulary.frequencies, strict=True)
        )
        numbers = {int(record.category_ids[0]) for record in record_set.records}
        assert [sum(groups[k] == group for k in numbers) for group in "rcf"] == [56, 79, 75]
        found[source.images] = (
            [record.key for record in record_set.records],
            shards_of(tmp_path, source)[1],
        )
    first, *others = found.values()
    assert len(set(first[0])) == 235 and len(first[1]) == 4
    assert all(other == first for other in others)


def test_the_plain_list_of_a_thousand_wnids(shared_data: Path) -> None:
    source = Source(
        name="real",
        format="imagenet21k",
        images="imagenet21k_sample",
        annotations="detic_metadata/imagenet_lvis_wnid.txt",
        use_labels=False,
    )
    record_set = list_records(source, str(shared_data))
    assert len(record_set.records) == 235
    assert record_set.dropped["wnid of the annotations without a folder or an archive"] == 997 - 210
