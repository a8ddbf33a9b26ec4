import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
from raw_data import (
    CC3M,
    IMAGENET,
    LVIS,
    data_of,
    in_line,
    lvis_tree,
    photograph,
    write,
    write_lvis,
)

from pipeline.data.sample import UNLABELLED, Sample
from pipeline.data.shards.preparing import (
    Index,
    ShardInfo,
    ShardTask,
    load_index,
    prepare_source,
    shards_url,
)
from pipeline.data.sources import list_records, read_record
from pipeline.data.storage.files import resolve
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.recipe import Source


class Runner:
    """`run_tasks` that remembers which shards it was asked for."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.files: list[str] = []
        self.stop_after = stop_after

    def __call__(
        self, function: Callable[[ShardTask], ShardInfo], arguments: Sequence[ShardTask]
    ) -> Iterator[tuple[int, ShardInfo]]:
        for position, argument in enumerate(arguments):
            if self.stop_after is not None and len(self.files) >= self.stop_after:
                raise KeyboardInterrupt
            self.files.append(argument.url.rsplit("/", 1)[-1])
            yield position, function(argument)


def prepare_lvis(root: Path, num_images: int = 10, **options: object) -> Index:
    if not (root / "lvis.json").exists():
        write_lvis(root, num_images=num_images)
    options = {"samples_per_shard": 4, **options}
    return prepare_source(LVIS, data_of(root, LVIS, **options), in_line)


def folder_of(root: Path) -> Path:
    return root / "shards" / "lvis_train"


def same(a: Sample, b: Sample) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in Sample.__dataclass_fields__
    )


def test_every_sample_comes_back_as_its_source_gives_it(tmp_path: Path) -> None:
    index = prepare_lvis(tmp_path)
    wanted = {r.image_id: read_record(r) for r in list_records(LVIS, str(tmp_path)).records}
    assert len(index) == index.num_samples == len(wanted) == 10
    assert [shard.count for shard in index.shards] == [4, 4, 2]
    assert sorted(index.image_id.tolist()) == sorted(wanted)
    for i in range(len(index)):
        sample = index.read(i)
        assert same(sample, wanted[int(index.image_id[i])])
        assert (index.width[i], index.height[i]) == (sample.width, sample.height)
        boxes = slice(index.category_offsets[i], index.category_offsets[i + 1])
        assert index.category_ids[boxes].tolist() == sample.category_ids.tolist()
    assert index.shard.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert index.vocabulary.ids == [3, 8]
    # Image k has k boxes of the two categories in turn.
    assert index.image_counts() == {3: 9, 8: 8}


def test_image_counts_name_categories_without_an_image(tmp_path: Path) -> None:
    assert prepare_lvis(tmp_path, num_images=2).image_counts() == {3: 1, 8: 0}


def test_stock_webdataset_reads_the_shards(tmp_path: Path) -> None:
    index = prepare_lvis(tmp_path)
    script = """
import json, sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    print(json.dumps([sample["__key__"], len(sample["jpg"]), json.loads(sample["json"])]))
"""
    urls = [index.shard_url(k) for k in range(len(index.shards))]
    done = subprocess.run(
        [sys.executable, "-c", script, *urls], capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    samples = [index.read(i) for i in range(len(index))]
    assert [row[0] for row in rows] == [sample.key for sample in samples]
    assert [row[1] for row in rows] == [len(sample.image) for sample in samples]
    assert [row[2]["image_id"] for row in rows] == index.image_id.tolist()
    np.testing.assert_array_equal(np.float32(rows[3][2]["boxes"]), samples[3].boxes)


def test_shards_are_plain_tars_of_images_and_json(tmp_path: Path) -> None:
    index = prepare_lvis(tmp_path)
    with tarfile.open(index.shard_url(0)) as archive:
        members = archive.getmembers()
    assert [m.name.split(".")[1] for m in members] == ["jpg", "json"] * 4
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {
        (0, 0, 0, "longtail", "longtail")
    }


def test_bytes_and_digests_do_not_depend_on_place_or_time(tmp_path: Path) -> None:
    indexes = [prepare_lvis(tmp_path / name) for name in ("a", "b")]
    for file in sorted(folder_of(tmp_path / "a").iterdir()):
        other = folder_of(tmp_path / "b") / file.name
        assert file.read_bytes() == other.read_bytes(), file.name
    assert indexes[0].digest == indexes[1].digest
    third = prepare_lvis(tmp_path / "c", num_images=9)
    assert third.digest != indexes[0].digest


def test_samples_of_a_class_do_not_lie_together(tmp_path: Path) -> None:
    index = prepare_lvis(tmp_path, num_images=40)
    ids = index.image_id.tolist()
    assert ids != sorted(ids) and sorted(ids) == list(range(10, 50))


def test_prepared_sources_are_left_alone(tmp_path: Path) -> None:
    first = prepare_lvis(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder_of(tmp_path).iterdir()}
    runner = Runner()
    again = prepare_source(LVIS, data_of(tmp_path, LVIS, samples_per_shard=4), runner)
    assert runner.files == [] and again.digest == first.digest
    assert {file: file.stat().st_mtime_ns for file in folder_of(tmp_path).iterdir()} == before


def test_shards_travel_without_their_raw_data(tmp_path: Path) -> None:
    before = prepare_lvis(tmp_path)
    (tmp_path / "lvis.json").unlink()
    runner, data = Runner(), data_of(tmp_path, LVIS, samples_per_shard=4)
    assert prepare_source(LVIS, data, runner).digest == before.digest
    assert not runner.files
    next(folder_of(tmp_path).glob("*.tar")).unlink()
    with pytest.raises(RecipeError, match=r"lvis\.json"):
        prepare_source(LVIS, data, runner)


def test_an_interrupted_preparation_goes_on(tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=10)
    data = data_of(tmp_path, LVIS, samples_per_shard=4)
    url = shards_url(data, LVIS)
    with pytest.raises(KeyboardInterrupt):
        prepare_source(LVIS, data, Runner(stop_after=2))
    with pytest.raises(StorageError, match="run `longtail prepare` first"):
        load_index(url)
    write(Path(url) / ".000002.tar.abc.tmp", b"left behind")
    # A sidecar without its whole tar does not count as finished.
    (Path(url) / "000001.tar").write_bytes(b"")
    runner, calls = Runner(), []
    index = prepare_source(LVIS, data, runner, lambda done, total, _: calls.append((done, total)))
    assert runner.files == ["000001.tar", "000002.tar"]
    assert calls == [(4, 10), (8, 10), (10, 10)]
    index.verify()
    assert index.digest == prepare_lvis(tmp_path / "clean").digest
    assert not list(Path(url).glob(".*"))


def test_only_the_shards_of_changed_records_are_written_again(tmp_path: Path) -> None:
    first = prepare_lvis(tmp_path)
    changed = int(first.image_id[5])
    tree = lvis_tree(10)
    next(i for i in tree["images"] if i["id"] == changed)["neg_category_ids"] = [3]
    write(tmp_path / "lvis.json", tree)
    runner = Runner()
    index = prepare_source(LVIS, data_of(tmp_path, LVIS, samples_per_shard=4), runner)
    assert runner.files == ["000001.tar"]
    assert index.digest != first.digest
    assert index.read(5).negative_category_ids == (3,)


def test_shards_that_are_no_longer_needed_go(tmp_path: Path) -> None:
    prepare_lvis(tmp_path)
    write(folder_of(tmp_path) / "notes.txt", "mine")
    prepare_lvis(tmp_path, samples_per_shard=10)
    names = sorted(file.name for file in folder_of(tmp_path).iterdir())
    assert names == ["000000.json", "000000.tar", "index.bin", "index.json", "notes.txt"]


def test_a_missing_shard_is_written_again(tmp_path: Path) -> None:
    first = prepare_lvis(tmp_path)
    (folder_of(tmp_path) / "000001.tar").unlink()
    with pytest.raises(StorageError, match=r"000001\.tar is missing"):
        first.read(5)
    with pytest.raises(StorageError, match=r"1 of 3 shards are damaged \(000001\.tar is missing"):
        first.verify()
    runner = Runner()
    index = prepare_source(LVIS, data_of(tmp_path, LVIS, samples_per_shard=4), runner)
    assert runner.files == ["000001.tar"] and index.digest == first.digest
    index.verify()


def test_every_truncation_and_bit_flip_of_a_shard_is_noticed(tmp_path: Path) -> None:
    index = prepare_lvis(tmp_path, num_images=3)
    file = folder_of(tmp_path) / "000000.tar"
    whole = file.read_bytes()
    samples = [index.read(i) for i in range(3)]
    for length in range(0, len(whole), 512):
        file.write_bytes(whole[:length])
        for i in range(3):
            try:
                assert same(index.read(i), samples[i])
            except StorageError as error:
                assert "000000.tar" in str(error) and "bytes came instead of" in str(error)
        with pytest.raises(StorageError, match=f"000000.tar has {length} bytes instead"):
            index.verify()
    columns = index._arrays
    for i in range(3):
        for column in ("image_offset", "json_offset"):
            flipped = bytearray(whole)
            flipped[int(columns[column][i]) + 20] ^= 4
            file.write_bytes(flipped)
            with pytest.raises(StorageError, match=f"sample {i} .* not what was written"):
                index.read(i)
            with pytest.raises(StorageError, match=r"000000\.tar has another sha256"):
                index.verify()


def test_damaged_index_files_are_noticed_and_mended(tmp_path: Path) -> None:
    first = prepare_lvis(tmp_path)
    folder = folder_of(tmp_path)
    arrays = folder / "index.bin"
    arrays.write_bytes(arrays.read_bytes()[:-7])
    with pytest.raises(StorageError, match=r"index\.bin is not what its index says"):
        load_index(str(folder)).read(0)
    for text in ("{", "[]", '{"format": 99}'):
        write(folder / "index.json", text)
        with pytest.raises(StorageError, match=r"index\.json"):
            load_index(str(folder))
    write(folder / "000000.json", "{")
    mended = prepare_lvis(tmp_path)
    assert same(mended.read(0), first.read(0)) and mended.digest == first.digest


def test_unreadable_images_are_skipped_and_reported_within_the_budget(tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=10)
    images = tmp_path / "lvis" / "train2017"
    write(images / f"{12:012d}.jpg", photograph(12)[:700])
    write(images / f"{13:012d}.jpg", "<html>not found</html>")
    (images / f"{14:012d}.jpg").unlink()
    with pytest.raises(DataError, match=r"lvis_train: . of 10 images cannot be read") as error:
        prepare_lvis(tmp_path, bad_sample_budget=2)
    assert error.value.exit_code == 65 and "bad_sample_budget allows 2" in str(error.value)
    assert not (folder_of(tmp_path) / "index.json").exists()
    index = prepare_lvis(tmp_path, bad_sample_budget=3)
    assert sorted(index.image_id.tolist()) == [10, 11, *range(15, 20)]
    unreadable = dict(index.report["unreadable"])  # type: ignore[call-overload]
    assert sorted(unreadable) == [f"{k:012d}" for k in (12, 13, 14)]
    assert "damaged" in unreadable[f"{12:012d}"] and "not an image" in unreadable[f"{13:012d}"]
    assert "does not exist" in unreadable[f"{14:012d}"]
    with pytest.raises(DataError, match="3 of 10"):
        prepare_lvis(tmp_path, bad_sample_budget=2)


def test_a_shard_without_a_readable_image_is_no_part_of_the_index(tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=3)
    write(tmp_path / "lvis" / "train2017" / f"{11:012d}.jpg", b"no image")
    index = prepare_lvis(tmp_path, samples_per_shard=1)
    assert [shard.count for shard in index.shards] == [1, 1]
    assert {index.read(i).image_id for i in range(2)} == {10, 12}
    assert prepare_lvis(tmp_path, samples_per_shard=1).digest == index.digest


def test_too_many_absent_images_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=10)
    for k in range(11, 20):
        (tmp_path / "lvis" / "train2017" / f"{k:012d}.jpg").unlink()
    runner = Runner()
    with pytest.raises(DataError, match="9 of 10 images"):
        prepare_source(LVIS, data_of(tmp_path, LVIS, bad_sample_budget=8), runner)
    assert runner.files == [] and not folder_of(tmp_path).exists()


def test_a_full_disk_is_a_storage_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=10)
    script = """
import resource, sys, signal
from raw_data import LVIS, data_of, in_line
from pipeline.data.shards.preparing import prepare_source
from pipeline.errors import StorageError
import webdataset.writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    prepare_source(LVIS, data_of(sys.argv[1], LVIS, samples_per_shard=4), in_line)
except StorageError as error:
    print(error)
"""
    here = Path(__file__).resolve()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{here.parents[1]}:{here.parents[3]}", "PATH": ""},
    )
    assert "cannot write" in done.stdout and ".tar" in done.stdout, done.stderr
    assert list(folder_of(tmp_path).iterdir()) == []


def test_an_index_pickles_without_its_arrays(tmp_path: Path) -> None:
    index = prepare_lvis(tmp_path)
    plain = len(pickle.dumps(index))
    assert index.width.sum() == 400 and index.category_ids.size == 45
    assert len(pickle.dumps(index)) == plain
    copy = pickle.loads(pickle.dumps(index))
    assert same(copy.read(3), index.read(3))


def test_image_level_and_caption_sources(tmp_path: Path) -> None:
    table = "wnid\tlvis_v1_id\tlvis_name\tlvis_synset\tlvis_frequency\n"
    write(tmp_path / "imagenet" / "wnids.tsv", table + "n01\t3\tcat\tcat.n.01\tf\n")
    for k in range(3):
        write(tmp_path / "imagenet" / "n01" / f"n01_{k}.JPEG", photograph(k, format="PNG"))
    write(tmp_path / "cc3m" / "a.jpg", photograph(9))
    write(tmp_path / "captions.tsv", "a caf\u00e9 cat\thttp://x.org/a.jpg\n")
    data = data_of(tmp_path, IMAGENET, CC3M)
    imagenet = prepare_source(IMAGENET, data, in_line)
    assert imagenet.image_counts() == {3: 3}
    sample = imagenet.read(0)
    assert sample.coarse and sample.extension == "png"
    assert sample.boxes.tolist() == [[0, 0, 40, 30]]
    captions = prepare_source(CC3M, data, in_line)
    assert captions.read(0).caption == "a caf\u00e9 cat"
    assert captions.category_ids.tolist() == [UNLABELLED] and captions.image_counts() == {}


def test_shards_on_an_object_store(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        write_lvis(tmp_path, num_images=10)
        data = data_of(tmp_path, LVIS, samples_per_shard=4, shards="memory://bucket/shards")
        index = prepare_source(LVIS, data, in_line)
        assert index.url == "memory://bucket/shards/lvis_train"
        index.verify()
        assert index.digest == prepare_lvis(tmp_path / "local").digest
        runner = Runner()
        assert prepare_source(LVIS, data, runner).digest == index.digest
        assert runner.files == []
        assert same(load_index(index.url).read(7), index.read(7))
        memory.rm_file("/bucket/shards/lvis_train/000001.tar")
        with pytest.raises(StorageError, match=r"000001\.tar is missing"):
            index.read(5)
    finally:
        memory.store.clear()


def test_paths_of_the_recipe_lead_somewhere_definite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("data", "lvis", "val2017") == str(tmp_path / "data" / "lvis" / "val2017")
    assert resolve("data", "/elsewhere") == "/elsewhere"
    assert resolve("s3://bucket/", "lvis") == "s3://bucket/lvis"
    assert resolve("data", "s3://bucket/shards", "x") == "s3://bucket/shards/x"
    for shards in ("simplecache::s3://bucket/x", "nonsense://bucket/x"):
        write_lvis(tmp_path)
        with pytest.raises(RecipeError, match=shards.split(":")[0]):
            prepare_source(LVIS, data_of(tmp_path, LVIS, shards=shards), in_line)


def test_real_photographs_through_shards(shared_data: Path, tmp_path: Path) -> None:
    nine = Source(
        name="nine",
        format="lvis",
        images="lvis",
        annotations="derived/lvis_val_9_as_v1_categories.json",
    )
    hundred = nine.model_copy(
        update={"name": "hundred", "annotations": "derived/lvis_val_100_as_v1_categories.json"}
    )
    imagenet = Source(
        name="imagenet",
        format="imagenet21k",
        images="imagenet21k_sample",
        annotations="derived/imagenet_lvis_wnid_to_lvis_v1.tsv",
    )
    options = {"shards": str(tmp_path), "samples_per_shard": 100}
    data = data_of(shared_data, nine, hundred, imagenet, **options)
    index = prepare_source(nine, data, in_line)
    assert index.num_samples == 9 and sum(index.image_counts().values()) == 35
    assert prepare_source(imagenet, data, in_line).num_samples == 235
    # 91 of the hundred photographs are not there: within a budget of 100, and over one of 90.
    assert prepare_source(hundred, data, in_line).num_samples == 9
    shutil.rmtree(tmp_path / "hundred")
    strict = data_of(shared_data, nine, hundred, bad_sample_budget=90, **options)
    with pytest.raises(DataError, match="hundred: 91 of 100 images cannot be read"):
        prepare_source(hundred, strict, in_line)


def test_real_truncated_photographs_are_reported(shared_data: Path, tmp_path: Path) -> None:
    tree = lvis_tree(3)
    write_lvis(tmp_path, tree)
    for k, file in enumerate(sorted((shared_data / "broken").glob("*.jpg"))):
        write(tmp_path / "lvis" / "train2017" / f"{10 + k:012d}.jpg", file.read_bytes())
    index = prepare_lvis(tmp_path)
    assert index.image_id.tolist() == [12]
    unreadable = index.report["unreadable"]
    assert isinstance(unreadable, list) and len(unreadable) == 2
