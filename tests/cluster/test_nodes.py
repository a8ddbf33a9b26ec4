"""Nodes that are lost, join and are taken away, under a run with `cluster.workers: [1, 2]`."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest
from processes import descendants
from tiny_world import (
    ENVIRONMENT,
    ROOT,
    metrics,
    prepare,
    run_command,
    start_command,
    tiny_recipe,
    wait_for_step,
    write_recipe,
)

from pipeline.training.manifest import list_checkpoints, read_manifest
from pipeline.training.samples import read_samples

sys.path.insert(0, str(ROOT / "benchmarks"))

from faults_nodes import Nodes

pytestmark = pytest.mark.slow
PATIENCE_S = 900.0
WORKERS = {"workers": [1, 2], "gpus_per_worker": 0, "hang_timeout": None}
STEPS = 24
ALONE = """
import sys
from pipeline.recipe_file import load_recipe
from pipeline.training.loop import train_here

train_here(load_recipe(sys.argv[1]))
"""


@contextmanager
def nodes(log: Path) -> Iterator[Nodes]:
    with Nodes(log) as found:
        os.environ.update(found.environment)
        ENVIRONMENT.update(found.environment)
        try:
            yield found
        finally:
            for name in found.environment:
                del os.environ[name], ENVIRONMENT[name]


def wait_for_line(log: Path, text: str, process: subprocess.Popen[bytes], after: int = 0) -> int:
    """Return how many bytes the log has when `text` stands in it behind the first `after`."""
    deadline = time.monotonic() + PATIENCE_S
    while text not in log.read_bytes()[after:].decode(errors="replace"):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"no {text!r} in {log.read_text()[-3000:]}"
        time.sleep(0.1)
    return log.stat().st_size


@contextmanager
def stopped(cluster: Nodes) -> Iterator[None]:
    """The only worker is stopped meanwhile, so that the run does not end before its time."""
    [worker] = descendants(cluster.pid, "RayTrainWorker")
    os.kill(worker, signal.SIGSTOP)
    yield
    os.kill(worker, signal.SIGCONT)


def test_nodes_are_lost_and_join_and_are_taken_away(tmp_path: Path) -> None:
    """At 2, 1, 2 and again 1 workers, on the same global batches as one process."""
    prepare(tmp_path)
    training = {"steps": STEPS, "checkpoint_every": 5, "keep_checkpoints": STEPS}
    settings = {"training": training, "logging": {"samples": True}}
    alone = tiny_recipe(tmp_path, "alone", **settings, cluster=WORKERS)
    (tmp_path / "alone.py").write_text(ALONE)
    done = run_command(str(tmp_path / "alone.py"), str(write_recipe(tmp_path, alone)))
    assert done.returncode == 0, done.stderr

    log = tmp_path / "elastic.log"
    with nodes(tmp_path / "nodes.log") as cluster:
        joined = {**WORKERS, "address": cluster.address}
        recipe = tiny_recipe(tmp_path, "elastic", **settings, cluster=joined)
        path = str(write_recipe(tmp_path, recipe))
        process = start_command("-m", "pipeline", "train", path, log=log)
        wait_for_step(recipe, 6, process, PATIENCE_S)
        cluster.lose()
        wait_for_line(log, "1 worker begins", process)
        # Those of before may have done more than six; it grows only after a step of its own.
        wait_for_step(recipe, len(metrics(recipe)) + 1, process, PATIENCE_S)
        with stopped(cluster):
            cluster.add()
            grown = wait_for_line(log, "there is place for 2 workers", process)
        grown = wait_for_line(log, "2 workers begin", process, grown)
        wait_for_line(log, "steps", process, grown)
        cluster.drain()
        assert process.wait(timeout=PATIENCE_S) == 0, log.read_text()

    said = log.read_text()
    # Of a fast machine the second checkpoint may be there before the node is lost.
    assert re.search(r"was lost with its node; restart 1 of 3, from step (5|10)\b", said), said
    assert "restart 2" not in said, "a node that is announced to go is no failure"
    assert "will be taken away in" in said
    manifests = [read_manifest(directory) for directory in list_checkpoints(recipe.run_dir)]
    sizes = [size for size, _ in groupby(manifest.world_size for manifest in manifests)]
    assert sizes == [2, 1, 2, 1], said
    counted, undisturbed = read_samples(recipe.run_dir), read_samples(alone.run_dir)
    assert counted.missing(STEPS) == [] and undisturbed.missing(STEPS) == []
    assert not counted.beyond(undisturbed) and not undisturbed.beyond(counted)
    ours, theirs = metrics(recipe), metrics(alone)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["consumed"] == other["consumed"] and mine["samples"] == other["samples"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
