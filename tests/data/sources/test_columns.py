"""Records as columns: what they give, how small they are, and what their digest says."""

import json
import pickle
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.data.sources.columns import (
    ColumnsBuilder,
    RecordColumns,
    Texts,
    record_keys,
    take_records,
)
from pipeline.data.sources.record import Record

NAMES = ["a.jpg", "züge.png", "b\udcff.jpg"]
CAPTIONS = ["a cat", "", "写真 of a dog"]


def example() -> RecordColumns:
    builder = ColumnsBuilder()
    captions = [caption.encode() for caption in CAPTIONS]
    builder.add(
        "s3://bucket/x.tar",
        keys=[b"k0", b"k1"],
        starts=[512, 5_000_000_000],
        num_bytes=[7, 300_000],
        labels=[[3, 8], [-1]],
        captions=captions[:2],
    )
    builder.add(
        "/data/folder",
        keys=[b"n0", b"n1", b"n2"],
        names=NAMES,
        num_bytes=[1, 2, 3],
        labels=4000,
        captions=captions,
        image_ids=[70, 80, 90],
    )
    builder.add("/data/empty", keys=[], num_bytes=[], labels=1, names=[], captions=[])
    return builder.finish()


def plain(record: Record) -> tuple[object, ...]:
    values = {name: getattr(record, name) for name in Record.__slots__}
    return tuple(v.tolist() if isinstance(v, np.ndarray) else v for v in values.values())


def test_records_come_back_as_they_went_in() -> None:
    records = example()
    assert len(records) == 5
    first, second, third, *_, last = records
    assert plain(first) == plain(
        Record(
            key="k0",
            path="s3://bucket/x.tar",
            image_id=0,
            boxes=None,
            category_ids=np.array([3, 8]),
            coarse=True,
            caption="a cat",
            num_bytes=7,
            offset=512,
        )
    )
    assert second.offset == 5_000_000_000 and second.category_ids.tolist() == [-1]
    assert second.category_ids.dtype == np.int64
    assert third.path == "/data/folder/a.jpg" and third.offset is None and third.image_id == 70
    assert last.path == "/data/folder/b\udcff.jpg" and last.caption == CAPTIONS[2]
    assert plain(records[-1]) == plain(last)
    assert [plain(r) for r in records[1:4]] == [plain(records[i]) for i in (1, 2, 3)]
    with pytest.raises(IndexError):
        records[5]


@pytest.mark.parametrize("order", [[], [3], [4, 0, 2], [0, 1, 2, 3, 4], [1, 1]])
def test_a_subset_holds_its_rows_and_travels(order: list[int]) -> None:
    records = example()
    subset = pickle.loads(pickle.dumps(records.subset(np.array(order, dtype=np.int64))))
    assert [plain(r) for r in subset] == [plain(records[i]) for i in order]
    assert list(record_keys(subset)) == [records[i].key.encode() for i in order]
    taken: Sequence[Record] = take_records(tuple(records), np.array(order, dtype=np.int64))
    assert [plain(r) for r in taken] == [plain(r) for r in subset]


def large(count: int = 100_000, width: int = 3) -> RecordColumns:
    builder = ColumnsBuilder()
    per_archive = count // 100
    for k in range(100):
        builder.add(
            f"/datasets/imagenet21k/fall11/n{k:08d}.tar",
            keys=[b"n%08d_%d" % (k, i * width) for i in range(per_archive)],
            starts=[512 + i * 110_000 for i in range(per_archive)],
            num_bytes=[100_000 + i for i in range(per_archive)],
            labels=k * 12,
        )
    return builder.finish()


def test_records_take_bytes_and_not_objects() -> None:
    records = large()
    assert records.nbytes / len(records) < 64
    chunk = records.subset(np.random.default_rng(0).permutation(len(records))[:1000])
    assert len(pickle.dumps(chunk)) < 1000 * 80
    assert len(list(records.iter_keys())) == len(set(records.iter_keys())) == len(records)


def test_the_digest_is_of_the_rows_alone() -> None:
    def build(places: list[tuple[str, int, int]]) -> RecordColumns:
        builder = ColumnsBuilder()
        for place, first, size in places:
            numbers = range(first, first + 3)
            builder.add(
                place,
                keys=[b"%d" % i for i in numbers],
                starts=[size * i for i in numbers],
                num_bytes=[min(size, 1000) for _ in numbers],
                labels=first,
                image_ids=numbers,
            )
        return builder.finish()

    alone = build([("x.tar", 4, 600)])
    # The same rows in a set that needs wider integers and has another archive in front.
    among = build([("a.tar", 1_000_000, 1 << 40), ("/elsewhere/x.tar", 4, 600)])
    assert among.image_ids.dtype != alone.image_ids.dtype
    assert among.subset(np.array([3, 4, 5])).digest() == alone.digest()
    assert among.subset(np.array([3, 5, 4])).digest() != alone.digest()
    assert among.subset(np.array([0, 1, 2])).digest() != alone.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"keys": [b"k0", b"other"]},
        {"num_bytes": [7, 8]},
        {"labels": [[3], [8, -1]]},
        {"labels": [[3, 8], [9]]},
        {"captions": [b"a ca", b"t"]},
        {"image_ids": [0, 2]},
    ],
)
def test_the_digest_sees_every_change(change: dict[str, list]) -> None:
    content: dict[str, list] = {
        "keys": [b"k0", b"k1"],
        "num_bytes": [7, 300_000],
        "labels": [[3, 8], [-1]],
        "captions": [b"a cat", b""],
        "image_ids": [0, 1],
    }
    digests = []
    for given in (content, content, content | change):
        for place in ({"starts": [512, 1024]}, {"names": ["a.jpg", "b.jpg"]}):
            builder = ColumnsBuilder()
            builder.add("somewhere", **given, **place)
            digests.append(builder.finish().digest())
    assert len(set(digests[:4])) == 1, "where an image lies does not count"
    assert len(set(digests[4:])) == 1 and digests[4] != digests[0]


def test_texts_are_read_in_runs() -> None:
    strings = [json.dumps(i).encode() * (i % 3) for i in range(9000)]
    texts = Texts.of(strings)
    assert list(texts) == strings and len(texts) == 9000
    assert [texts[i] for i in (0, 4095, 4096, 8999)] == [strings[i] for i in (0, 4095, 4096, 8999)]
    order = np.array([8999, 0, 5, 5])
    assert list(texts.take(order)) == [strings[i] for i in order]


def test_nothing_at_all_is_an_empty_set() -> None:
    records = ColumnsBuilder().finish()
    assert len(records) == 0 and list(records) == [] and not records
    assert records.subset(np.zeros(0, dtype=np.int64)).digest() == records.digest()
