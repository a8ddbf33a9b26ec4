"""What an index of millions of samples costs: to plan, to write, to load, and to hold in memory.

    python benchmarks/index_memory.py --samples 14200000

Generates records and shard columns of the size of ImageNet-21k (one box an image), so nothing is
read but the index itself. Memory of a process is its proportional set size (PSS), which counts a
page that n processes share as 1/n of a page.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.data.shards.index import Index, ShardFile, load_index, write_index
from pipeline.data.shards.tasks import ShardPlan
from pipeline.data.sources.columns import ColumnsBuilder, RecordColumns
from pipeline.data.vocabulary.categories import Category, Vocabulary

CATEGORIES = 1000
PER_SHARD = 1000
READER = """
import json, sys, time
from benchmarks.index_memory import memory_mb
from pipeline.data.shards.index import load_index
before, started = memory_mb(), time.perf_counter()
index = load_index(sys.argv[1])
columns = (index.shard, index.width, index.height, index.image_id, index.category_offsets,
           index.category_ids, *(index._arrays[name] for name in ("image_offset", "crc32")))
loaded = time.perf_counter() - started
touched = sum(int(column.max()) for column in columns)
print(json.dumps({"loaded": loaded, "memory": [before, memory_mb()]}), flush=True)
sys.stdin.readline()
print(json.dumps(memory_mb()), flush=True)
"""


def memory_mb() -> dict[str, float]:
    """Of this process, in MB: what is its own alone (`private`), and its share of all (`pss`)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    private = int(values["Private_Dirty"]) + int(values["Private_Clean"])
    return {"pss": int(values["Pss"]) / 1024, "private": private / 1024}


def peak_mb() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_records(number: int) -> RecordColumns:
    """Image-level records in one archive for each category."""
    builder, rng = ColumnsBuilder(), np.random.default_rng(0)
    for category in range(CATEGORIES):
        count = number // CATEGORIES + (category < number % CATEGORIES)
        builder.add(
            f"n{category:08d}.tar",
            keys=[f"n{category:08d}_{k}".encode() for k in range(count)],
            num_bytes=rng.integers(10_000, 200_000, size=count).tolist(),
            labels=category,
            starts=(np.arange(count) * 200_000).tolist(),
        )
    return builder.finish()


def make_index(folder: str, number: int) -> Index:
    """The index of shards that are not there."""
    rng = np.random.default_rng(0)
    shards = []
    for k in range(-(-number // PER_SHARD)):
        count = min(PER_SHARD, number - k * PER_SHARD)
        sizes = rng.integers(10_000, 200_000, size=count)
        ends = np.cumsum(sizes + 2048)
        columns = {
            "image_offset": ends - sizes - 1024,
            "image_size": sizes,
            "json_offset": ends - 512,
            "json_size": np.full(count, 300),
            "crc32": rng.integers(0, 2**32, size=count),
            "width": np.full(count, 500),
            "height": np.full(count, 375),
            "image_id": np.arange(count) + k * PER_SHARD,
            "num_boxes": np.ones(count, dtype=np.int64),
            "category_ids": rng.integers(0, CATEGORIES, size=count),
        }
        kinds = {"crc32": np.uint32, "image_id": np.int64}
        compact = {name: v.astype(kinds.get(name, np.int32)) for name, v in columns.items()}
        shards.append((ShardFile(f"{k:06d}.tar", int(ends[-1]) + 1024, "0" * 64, count), compact))
    vocabulary = Vocabulary([Category(i, f"category {i}") for i in range(CATEGORIES)])
    return write_index(folder, "large", vocabulary, shards, inputs_digest="", report={})


def measure_plan(number: int) -> None:
    """Seconds and memory of planning, and of making one task."""
    started = time.perf_counter()
    records = make_records(number)
    print(f"  records made            {time.perf_counter() - started:8.1f} s", flush=True)
    print(f"  records                 {records.nbytes / number:8.1f} bytes a sample")
    before, started = memory_mb()["pss"], time.perf_counter()
    plan = ShardPlan("out", records, PER_SHARD)
    print(f"  order and {len(plan):,} digests {time.perf_counter() - started:8.1f} s")
    print(f"  memory of the plan      {memory_mb()['pss'] - before:8.0f} MB")
    started = time.perf_counter()
    for k in range(0, len(plan), max(1, len(plan) // 100)):
        assert len(plan[k].records) == plan.count_of(k)
    print(f"  one task                {(time.perf_counter() - started) * 10:8.2f} ms")
    print(f"  peak of the process     {peak_mb():8.0f} MB", flush=True)


def measure_index(folder: str, number: int) -> None:
    """Seconds and memory of writing, loading and holding an index."""
    started = time.perf_counter()
    make_index(folder, number)
    size = Path(folder, "index.bin").stat().st_size
    print(f"  made and written        {time.perf_counter() - started:8.1f} s", flush=True)
    print(f"  index.bin               {size / 1e6:8.0f} MB, {size / number:.1f} bytes a sample")
    for name in ("first time, hashed and checked", "again on this machine"):
        started = time.perf_counter()
        index = load_index(folder)
        header, started = time.perf_counter() - started, time.perf_counter()
        assert len(index.width) == number
        columns = time.perf_counter() - started
        print(f"  load, {name:30s} {header:6.2f} s header, {columns:6.2f} s columns", flush=True)
    started = time.perf_counter()
    index.image_counts()
    print(f"  image_counts            {time.perf_counter() - started:8.4f} s")
    started = time.perf_counter()
    assert int(index.category_offsets[-1]) == number
    print(f"  category_offsets        {time.perf_counter() - started:8.4f} s")
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    first = [json.loads(reader.stdout.readline()) for reader in readers if reader.stdout]
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
    last = [json.loads(reader.stdout.readline()) for reader in readers if reader.stdout]
    for reader in readers:
        reader.communicate()
    for k, (found, now) in enumerate(zip(first, last, strict=True)):
        before = found["memory"][0]
        print(
            f"  process {k} of 2, all columns read: loaded in {found['loaded']:.2f} s; "
            f"private {now['private'] - before['private']:+.0f} MB, "
            f"PSS {now['pss'] - before['pss']:+.0f} MB"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where to write the index; a temporary folder by default")
    number = parser.parse_args().samples
    print(f"planning {number:,} samples, {PER_SHARD:,} a shard")
    measure_plan(number)
    print(f"an index of {number:,} samples, one box each")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        measure_index(folder, number)


if __name__ == "__main__":
    main()
