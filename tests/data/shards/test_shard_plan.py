"""Which records go into which shard: a fair draw, made when asked for, and locked."""

import hashlib
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_data import LVIS, data_of, in_line, lvis_tree, photograph, write, write_lvis

from pipeline.data.sample import Sample
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.shards.report import describe_preparation
from pipeline.data.shards.smaller import scale_down
from pipeline.data.shards.tasks import ShardPlan, hash_order
from pipeline.data.sources import Record, list_records
from pipeline.data.sources.columns import ColumnsBuilder, RecordColumns
from pipeline.data.storage.lock import LOCK_FILE, sole_writer
from pipeline.errors import DataError, StorageError


def columns_of(number: int, num_bytes: int = 1000) -> RecordColumns:
    builder = ColumnsBuilder()
    keys = [f"n01_{k}".encode() for k in range(number)]
    builder.add(
        "a.tar", keys=keys, num_bytes=[num_bytes] * number, labels=3, starts=list(range(number))
    )
    return builder.finish()


def test_the_order_is_that_of_the_hashes() -> None:
    keys = [f"n01_{k}" for k in range(200)]
    wanted = sorted(keys, key=lambda key: hashlib.blake2b(key.encode(), digest_size=8).digest())
    records = columns_of(200)
    assert [records[int(i)].key for i in hash_order(records)] == wanted


def test_every_record_is_in_one_shard() -> None:
    plan = ShardPlan("out", columns_of(25), 10)
    assert [len(plan[k].records) for k in range(3)] == [10, 10, 5]
    assert [plan.count_of(k) for k in range(3)] == [10, 10, 5]
    keys = {record.key for task in plan for record in task.records}
    assert len(keys) == 25
    assert [task.url for task in plan] == [f"out/{k:06d}.tar" for k in range(3)]
    assert [task.inputs_digest for task in plan] == plan.digests


def test_digests_change_with_what_a_shard_is_made_of(tmp_path: Path) -> None:
    plain = ShardPlan("out", columns_of(25), 10).digests
    assert ShardPlan("elsewhere", columns_of(25), 10).digests == plain
    assert ShardPlan("out", columns_of(25, num_bytes=999), 10).digests != plain
    smaller = ShardPlan("out", columns_of(25), 10, 400).digests
    assert not set(smaller) & set(plain)
    assert not set(ShardPlan("out", columns_of(25), 10, 401).digests) & set(smaller)
    # The same numbers as fractions of the image are other boxes.
    write_lvis(tmp_path, num_images=4)
    record = list_records(LVIS, str(tmp_path)).records[3]
    relative = Record(**{name: getattr(record, name) for name in Record.__slots__})
    object.__setattr__(relative, "relative_boxes", True)
    assert ShardPlan("out", [record], 1).digests != ShardPlan("out", [relative], 1).digests


def test_two_records_of_one_key_are_refused() -> None:
    twice = [*columns_of(5), columns_of(3)[2]]
    with pytest.raises(DataError, match="have one key, 'n01_2'"):
        hash_order(twice)


def test_one_process_prepares_a_directory_and_none_locks_it_for_ever(tmp_path: Path) -> None:
    url = str(tmp_path / "shards" / "lvis_train")
    script = (
        "import sys, time\nfrom pipeline.data.storage.lock import sole_writer\n"
        "with sole_writer(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    holder = subprocess.Popen(
        [sys.executable, "-c", script, url], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        write_lvis(tmp_path, num_images=3)
        with pytest.raises(StorageError, match=f"is being prepared by process {holder.pid} on"):
            prepare_source(LVIS, data_of(tmp_path, LVIS), in_line)
        holder.kill()
        holder.wait()
        assert (Path(url) / LOCK_FILE).exists(), "killed, it leaves the file and no lock"
        index = prepare_source(LVIS, data_of(tmp_path, LVIS), in_line)
        assert index.num_samples == 3 and not (Path(url) / LOCK_FILE).exists()
    finally:
        holder.kill()
    with sole_writer("memory://no/locks"), sole_writer("memory://no/locks"):
        pass


def sample_of(size: tuple[int, int], extension: str, smooth: bool = False) -> Sample:
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    data = photograph(1, size, format=kind)
    if smooth:
        buffer = BytesIO()
        Image.new("RGB", size, "red").save(buffer, kind)
        data = buffer.getvalue()
    boxes = np.array([[0, 0, size[0], size[1]], [10, 20, 30, 60]], dtype=np.float32)
    ids = np.array([3, 8])
    return Sample("a", data, extension, 1, *size, boxes, ids, (), (), False, None)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_images_are_stored_smaller_with_their_boxes(extension: str) -> None:
    sample = sample_of((301, 200), extension)
    smaller = scale_down(sample, 100)
    assert (smaller.width, smaller.height) == (150, 100)
    assert smaller.extension == ("png" if extension == "png" else "jpg")
    image = Image.open(BytesIO(smaller.image))
    assert image.size == (150, 100) and image.format == ("PNG" if extension == "png" else "JPEG")
    assert len(smaller.image) < len(sample.image)
    np.testing.assert_allclose(smaller.boxes[0], [0, 0, 150, 100], rtol=1e-6)
    np.testing.assert_allclose(
        smaller.boxes[1], [10 * 150 / 301, 10, 30 * 150 / 301, 30], rtol=1e-6
    )
    assert scale_down(sample, 100).image == smaller.image
    assert scale_down(sample, 200) is sample and scale_down(sample, 201) is sample


def test_an_image_stays_where_scaling_saves_nothing() -> None:
    sample = sample_of((8, 8), "png", smooth=True)
    assert scale_down(sample, 7) is sample


def test_what_was_scaled_is_reported(tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=10)
    big = lvis_tree(10)
    for image in big["images"][:4]:
        image.update(width=80, height=60)
        write(tmp_path / "lvis/train2017" / f"{image['id']:012d}.jpg", photograph(1, (80, 60)))
    write(tmp_path / "lvis.json", big)
    data = data_of(tmp_path, LVIS, samples_per_shard=4)
    plain = prepare_source(LVIS, data, in_line)
    assert set(plain.width.tolist()) == {40, 80}
    index = prepare_source(LVIS, data, in_line, short_side=30)
    assert set(index.width.tolist()) == {40}
    scaled = index.report["scaled"]
    assert isinstance(scaled, dict) and scaled["images"] == 4
    assert scaled["bytes_after"] < scaled["bytes_before"] / 2
    assert "4  images scaled down: " in describe_preparation(index)
    assert prepare_source(LVIS, data, in_line).digest == plain.digest, "the setting counts"
