"""A stream that runs for days holds no more in its second half than in its first."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pytest
from coloured_world import VOCABULARY, make_index, some_data

from pipeline.data.stream.batches import Stream
from pipeline.recipe import Training, Transforms

NUM_SAMPLES = 200_000
BATCH = 40
ALLOWED_MEGABYTES = 16
"""What all processes together may hold more in the second half than in the first, whose middles are
100,000 samples apart: 160 bytes a sample, less than a Python object or two for each."""


def held() -> tuple[float, int]:
    """Megabytes (PSS and swap) and open files of this process and its reader processes."""
    own = psutil.Process()
    processes = [own, *own.children(recursive=True)]
    infos = [process.memory_full_info() for process in processes]
    memory = sum(info.pss + info.swap for info in infos)
    return memory / 1e6, sum(process.num_fds() for process in processes)


def stream_and_measure(folder: Path) -> tuple[list[float], list[int]]:
    """What is held at each hundredth of the samples."""
    index = make_index(folder, "train", VOCABULARY, [[3], [5, 8], []] * 40)
    tiny = Transforms(short_sides=[8, 12], max_side=16, crop_probability=0)
    data = some_data(extra=[], workers=2, transforms=tiny)
    training = Training(steps=1 << 40, batch_size=BATCH, micro_batch=20)
    stream = Stream(data, training, {"train": index}, VOCABULARY, seed=3)
    steps = NUM_SAMPLES // BATCH
    memory, files = [], []
    for step in stream.iterate(0, steps):
        if step.step % (steps // 100) == 0:
            megabytes, number = held()
            memory.append(megabytes)
            files.append(number)
    return memory, files


@pytest.mark.slow
def test_neither_memory_nor_files_grow_over_200_000_samples(tmp_path: Path) -> None:
    # In a process of its own: this one holds gigabytes of the tests before.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        memory, files = pool.submit(stream_and_measure, tmp_path).result()
    # The first tenth fills caches: windows of the plan, allocators, files that stay open.
    first, second = np.array(memory[10:50]), np.array(memory[50:])
    print(f"{first.mean():.1f} MB, then {second.mean():.1f} MB; {max(files)} files")
    assert second.mean() < first.mean() + ALLOWED_MEGABYTES
    assert second.max() < first.max() + ALLOWED_MEGABYTES
    assert max(files[50:]) <= max(files[10:50])
