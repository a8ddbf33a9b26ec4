"""The index as a file: mapped, shared, checked, and refused when it is forged."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coloured_world import COLOURS, VOCABULARY, make_index
from numpy.typing import NDArray
from raw_data import LVIS, data_of, in_line, write, write_lvis

from pipeline.data.sample import UNLABELLED
from pipeline.data.shards import index_arrays
from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.index_arrays import category_counts, check_columns, smallest
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.storage import local_copy
from pipeline.errors import StorageError

Columns = dict[str, NDArray[np.integer]]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    assert set(VOCABULARY.ids) < set(COLOURS)
    objects = [[3], [5, 8], [], [3, 5, 8], [8], [UNLABELLED], [3, 3]]
    return make_index(tmp_path, "train", VOCABULARY, objects)


def test_columns_have_the_promised_types_and_cannot_be_written(index: Index) -> None:
    again = load_index(index.url)
    kinds = {
        "shard": np.int32,
        "width": np.int32,
        "height": np.int32,
        "image_id": np.int64,
        "category_offsets": np.int64,
        "category_ids": np.int32,
    }
    for name, kind in kinds.items():
        values = getattr(again, name)
        assert values.dtype == kind and type(values) is np.ndarray
        assert not values.flags.writeable
    assert again.shard.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert again.category_offsets.tolist() == [0, 1, 3, 3, 6, 7, 8, 10]
    assert again.category_ids.tolist() == [3, 5, 8, 3, 5, 8, 8, UNLABELLED, 3, 3]
    assert again.num_boxes == 10
    # An image with a category twice counts once.
    assert again.image_counts() == {3: 3, 5: 2, 8: 3}


def test_nothing_is_mapped_before_it_is_asked_for(index: Index) -> None:
    (Path(index.url) / "index.bin").unlink()
    again = load_index(index.url)
    assert again.image_counts() == {3: 3, 5: 2, 8: 3} and again.num_boxes == 10
    with pytest.raises(StorageError, match=r"index\.bin is missing; run `longtail prepare`"):
        again.width  # noqa: B018


def test_counts_are_those_of_a_plain_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_arrays, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, size=100)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.array([2, 3, 90])
    values = rng.choice([*ids, UNLABELLED], size=offsets[-1])
    images = [set(values[offsets[i] : offsets[i + 1]].tolist()) for i in range(100)]
    wanted = {int(k): sum(int(k) in image for image in images) for k in ids}
    assert category_counts(values, offsets, [90, 2, 3]) == wanted
    assert category_counts(values[values < 0], np.array([0, (values < 0).sum()]), []) == {}


def test_the_smallest_type_holds_the_values() -> None:
    for values, kind in (
        ([], "|u1"), ([255], "|u1"), ([256], "<u2"), ([65536], "<u4"), ([2**32], "<i8"),
        ([-1, 127], "|i1"), ([-1, 128], "<i2"), ([-(2**40)], "<i8"),
    ):  # fmt: skip
        found = smallest(np.array(values, dtype=np.int64))
        assert found.dtype == np.dtype(kind) and found.tolist() == values


FORGERIES: dict[str, Callable[[Columns], None]] = {
    "shard": lambda c: c["shard"].__setitem__(0, 1),
    "width": lambda c: c["width"].__setitem__(2, 0),
    "height": lambda c: c["height"].__setitem__(2, -5),
    "category_offsets": lambda c: c["category_offsets"].__setitem__(1, 9),
    "category_ids": lambda c: c["category_ids"].__setitem__(0, 2**31 - 1),
    "image_offset": lambda c: c.update(image_offset=c["image_offset"].astype(np.int64) + 2**40),
    "image_size": lambda c: c.update(image_size=c["image_size"].astype(np.int64) + 2**60),
    "json_size": lambda c: c.update(json_size=c["json_size"].astype(np.int64) - 10**9),
    "json_offset": lambda c: c.update(json_offset=-c["json_offset"].astype(np.int64)),
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_values_that_cannot_be_are_refused(
    index: Index, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_arrays, "_CHUNK", chunk)
    columns = {key: values.copy() for key, values in index._arrays.items()}
    shards = [(shard.count, shard.num_bytes) for shard in index.shards]
    check_columns(columns, shards, VOCABULARY.ids)
    FORGERIES[name](columns)
    with pytest.raises(ValueError, match=f"column {name} has values"):
        check_columns(columns, shards, VOCABULARY.ids)


def test_a_sample_that_begins_in_its_shard_must_end_there(index: Index) -> None:
    columns = {key: values.copy() for key, values in index._arrays.items()}
    shards = [(shard.count, shard.num_bytes) for shard in index.shards]
    columns["image_offset"] = columns["image_offset"].astype(np.int64)
    columns["image_offset"][0] = shards[0][1] - columns["image_size"][0]
    check_columns(columns, shards, VOCABULARY.ids)
    columns["image_offset"][0] += 1
    with pytest.raises(ValueError, match="column image_offset has values"):
        check_columns(columns, shards, VOCABULARY.ids)


def forged(index: Index, change: Callable[[dict], None]) -> Index:
    path = Path(index.url) / "index.json"
    header = json.loads(path.read_text())
    change(header)
    write(path, header)
    return load_index(index.url)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["arrays"]["columns"]["width"].update(start=10**9),
        lambda h: h["arrays"]["columns"]["width"].update(start=-4),
        lambda h: h["arrays"]["columns"]["width"].update(length=10**12),
        lambda h: h["arrays"]["columns"]["width"].update(dtype="<f8"),
        lambda h: h["arrays"]["columns"]["crc32"].update(dtype="|O"),
        lambda h: h["arrays"]["columns"]["category_ids"].update(length=9),
        lambda h: h["arrays"]["columns"].pop("json_size"),
        lambda h: h["arrays"].update(num_bytes=3),
        lambda h: h["arrays"].update(sha256="0" * 64),
        lambda h: h["shards"][0].update(file="../../secret.tar"),
        lambda h: h["shards"][0].update(count=10**15),
        lambda h: h["shards"][0].update(num_bytes="many"),
        lambda h: h["shards"][0].pop("sha256"),
        lambda h: h.update(shards=[]),
        lambda h: h.pop("vocabulary"),
    ],
)
def test_a_forged_header_is_refused(index: Index, change: Callable[[dict], None]) -> None:
    with pytest.raises(StorageError, match=r"index\.(json|bin) is .*run `longtail prepare` again"):
        forged(index, change).width  # noqa: B018


def test_a_forged_sample_of_gigabytes_is_not_read(index: Index) -> None:
    index._arrays["image_size"] = np.full(7, 2**31, dtype=np.int64)
    with pytest.raises(StorageError, match="sample 3 has"):
        index.read(3)


def test_an_index_of_the_first_format_is_prepared_again(tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=4)
    data = data_of(tmp_path, LVIS)
    index = prepare_source(LVIS, data, in_line)
    (Path(index.url) / "index.npz").touch()
    with pytest.raises(StorageError, match=r"format 1, and .* format 2; run `longtail prepare`"):
        forged(index, lambda header: header.update(format=1))
    assert prepare_source(LVIS, data, in_line).digest == index.digest
    assert not (Path(index.url) / "index.npz").exists()


def test_a_shard_of_other_data_with_the_same_name_is_noticed(tmp_path: Path) -> None:
    """Of another size, of the same size, and not there: each names the shard and the remedy."""
    write_lvis(tmp_path, num_images=6)
    index = prepare_source(LVIS, data_of(tmp_path, LVIS, samples_per_shard=3), in_line)
    first, second = (Path(index.shard_url(k)) for k in range(2))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes()[: len(whole)].ljust(len(whole), b"\0"))
    with pytest.raises(
        StorageError, match=r"000001\.tar: sample 3 .* run `longtail prepare` again"
    ):
        index.read(3)
    with pytest.raises(StorageError, match=r"000001\.tar has another sha256.*longtail prepare"):
        index.verify()
    second.write_bytes(whole + b"\0" * 512)
    with pytest.raises(StorageError, match=r"000001\.tar has .* bytes instead of"):
        index.verify()


def test_large_files_are_hashed_once(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(local_copy, "ALWAYS_HASHED", 0)
    path = Path(index.url) / "index.bin"
    load_index(index.url).width  # noqa: B018
    hashed: list[str] = []
    real = local_copy.hashlib.file_digest

    def count(*arguments):  # type: ignore[no-untyped-def]
        hashed.append(arguments[0].name)
        return real(*arguments)

    monkeypatch.setattr(local_copy.hashlib, "file_digest", count)
    assert load_index(index.url).width.shape == (7,) and not hashed
    # Another file in its place is another matter, of the same size too.
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"index\.bin is not what its index says"):
        load_index(index.url).width  # noqa: B018
    assert len(hashed) == 1
    # Where nothing can be noted, the file is hashed each time.
    data[200] ^= 1
    path.write_bytes(data)
    os.chmod(path, 0o600)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    for _ in range(2):
        assert load_index(index.url).width.shape == (7,)
    assert len(hashed) == 3
