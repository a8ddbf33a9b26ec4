"""Each validation image once, for any number of ranks; and readers that end with their process."""

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from coloured_world import COLOURS, VOCABULARY, colour_at, some_data

from pipeline.data.shards.index import Index
from pipeline.data.stream.batches import EvaluationSet
from pipeline.errors import LongtailError


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_visits_every_image_once(
    indexes: dict[str, Index], world_size: int, batch_size: int
) -> None:
    evaluation = EvaluationSet(some_data(), indexes["validation"], VOCABULARY)
    assert evaluation.num_images == 11
    seen = []
    for rank in range(world_size):
        for batch in evaluation.iterate(batch_size, rank, world_size):
            assert 1 <= len(batch.targets) <= batch_size
            for i, targets in enumerate(batch.targets):
                sample = indexes["validation"].read(targets.image_id)
                assert targets.original_size == (sample.height, sample.width)
                assert min(targets.size) == 64 or max(targets.size) == 128
                assert len(targets.boxes) == len(sample.boxes)
                for box, label in zip(targets.boxes, targets.labels, strict=True):
                    expected = COLOURS[VOCABULARY.ids[int(label)]]
                    assert np.abs(np.subtract(colour_at(batch, i, box), expected)).max() < 10
                seen.append(targets.image_id)
    assert seen == list(range(11))


def test_evaluation_needs_every_image(indexes: dict[str, Index], unreadable: set[bytes]) -> None:
    unreadable.add(indexes["validation"].read(3).image)
    evaluation = EvaluationSet(some_data(), indexes["validation"], VOCABULARY)
    batches = evaluation.iterate(2)
    assert len(list(islice(batches, 1))) == 1
    with pytest.raises(LongtailError, match="validation/000003: damaged"):
        list(batches)


@pytest.mark.slow
def test_readers_end_when_the_training_process_is_killed(indexes: dict[str, Index]) -> None:
    program = (
        "import multiprocessing, sys, time\n"
        "from pipeline.data.shards.index import load_index\n"
        "from pipeline.data.stream.batches import EvaluationSet\n"
        "from pipeline.recipe import Data\n"
        "if __name__ == '__main__':\n"
        "    index = load_index(sys.argv[1])\n"
        "    data = Data.model_validate_json(sys.argv[2])\n"
        "    batches = EvaluationSet(data, index, index.vocabulary).iterate(1)\n"
        "    next(batches)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(600)\n"
    )
    data = some_data(workers=2).model_dump_json()
    command = [sys.executable, "-c", program, indexes["validation"].url, data]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        readers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(readers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in readers):
        assert time.monotonic() < deadline, f"readers {readers} outlive their process"
        time.sleep(0.1)
