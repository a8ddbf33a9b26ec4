"""Faults of processes and nodes, and of what they compute, for `faults.py`."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import psutil
from faults_nodes import Nodes
from faults_trial import EVALUATION, HERE, TEACHER, WORKER, NotAvailable, Trial

from pipeline.recipe import Cluster

HANG_TIMEOUT_S = 90
"""Longer than the start of a worker takes where others use the machine too."""


def kill_worker(trial: Trial, which: int = 1) -> None:
    """SIGKILL to one of the two training workers, by the order in which they began."""
    trial.wait("two workers", lambda: len(trial.processes(WORKER)) == 2)
    trial.processes(WORKER)[which].kill()


def worker_killed(trial: Trial) -> bool:
    trial.start()
    trial.wait_for_step(trial.middle)
    back = trial.recovery()
    kill_worker(trial)
    back()
    return trial.finish()


def driver_killed(trial: Trial) -> bool:
    trial.start()
    trial.wait_for_step(trial.middle)
    return again(trial, signal.SIGKILL)


def sigterm(trial: Trial) -> bool:
    trial.start()
    trial.wait_for_step(trial.middle)
    survived = again(trial, signal.SIGTERM)
    assert trial.exit_codes[0] == 75, trial.exit_codes
    return survived


def again(trial: Trial, number: int) -> bool:
    """A signal to the driver, and the same command again when it has ended."""
    back = trial.recovery()
    trial.process.send_signal(number)
    trial.end()
    trial.start()
    back()
    return trial.finish()


def rank_hangs(trial: Trial) -> bool:
    if "hang_timeout" not in Cluster.model_fields:
        raise NotAvailable("this version has no cluster.hang_timeout")
    trial.overrides.append(f"cluster.hang_timeout={HANG_TIMEOUT_S}")
    trial.start()
    trial.wait_for_step(trial.middle)
    trial.wait("two workers", lambda: len(trial.processes(WORKER)) == 2)
    stopped = trial.processes(WORKER)[1]
    back = trial.recovery()
    stopped.suspend()
    try:
        back()
        trial.notes.append(f"cluster.hang_timeout={HANG_TIMEOUT_S}, which the seconds hold")
        return trial.finish()
    finally:
        with suppress(psutil.NoSuchProcess):
            stopped.kill()


def nan_loss(trial: Trial) -> bool:
    """The loss of one step is NaN; a worker is killed after it, and the step is done again."""
    fault = {
        "PYTHONPATH": os.pathsep.join([str(HERE / "faults_nan"), os.environ.get("PYTHONPATH", "")]),
        "LONGTAIL_NAN_STEP": str(trial.middle - 1),
    }
    trial.reference = Trial(trial.work, f"{trial.name}_alone", trial.overrides[3:])
    for one in (trial.reference, trial):
        one.environment |= fault
    assert trial.reference.finish(1), "the run that only has the NaN"
    trial.reference.close()
    worker_killed_again = worker_killed(trial)
    found = sorted((trial.run_dir / "not_finite").iterdir())
    assert [path.name for path in found] == [f"step_{trial.middle:08d}.json"], found
    trial.notes.append(
        f"step {trial.middle} is left out, its samples are in {found[0].name}; equal to a run with "
        "the same NaN and no kill"
    )
    return worker_killed_again


def out_of_memory(trial: Trial) -> bool:
    """SIGKILL to the process that holds the most, which is what the kernel does."""
    trial.start()
    trial.wait_for_step(trial.middle)
    trial.wait("two workers", lambda: len(trial.processes(WORKER)) == 2)
    back = trial.recovery()
    max(trial.processes(WORKER), key=lambda process: process.memory_info().rss).kill()
    trial.notes.append("SIGKILL to the largest process, as the kernel sends it")
    back()
    return trial.finish()


def teacher_lost(trial: Trial) -> bool:
    trial.overrides.append("teacher.placement=pool")
    trial.start()
    trial.wait_for_step(trial.middle)
    kill_teacher(trial)
    return trial.finish()


def kill_teacher(trial: Trial) -> None:
    """SIGKILL to the one teacher actor; returns at the first step whose labels it had not made."""
    trial.wait("a teacher", lambda: trial.processes(TEACHER))
    back = trial.recovery(restarts=False, under_way=1 + trial.recipe.teacher.batches_ahead)
    trial.processes(TEACHER)[0].kill()
    back()


def evaluation_lost(trial: Trial) -> bool:
    trial.overrides += ["evaluation.every=8", "evaluation.subset_images=6"]
    trial.start()
    trial.wait("an evaluation", lambda: trial.processes(EVALUATION))
    back = trial.recovery(restarts=False)
    trial.processes(EVALUATION)[0].kill()
    back()
    survived = trial.finish()
    assert "failed, trying again" in trial.log.read_text()
    done = (trial.run_dir / "metrics.jsonl").read_text().count('"event": "evaluation"')
    steps = (trial.recipe.training.steps - 1) // 8
    assert done == steps, f"{done} evaluations of {steps}"
    trial.notes.append(f"training did not stop; all {steps} evaluations were done")
    return survived


def node_lost(trial: Trial) -> bool:
    """One of two nodes dies with all that runs on it, and another one joins."""

    def lose_one(nodes: Nodes) -> None:
        nodes.lose()
        nodes.add()

    return on_two_nodes(trial, lose_one)


def node_preempted(trial: Trial) -> bool:
    """One of two nodes is announced to be taken away, and another one joins."""

    def replace_one(nodes: Nodes) -> None:
        nodes.drain()
        nodes.add()

    survived = on_two_nodes(trial, replace_one)
    assert "will be taken away in" in trial.log.read_text()
    return survived


def on_two_nodes(trial: Trial, disturb: Callable[[Nodes], None]) -> bool:
    """The training on a cluster of two nodes, disturbed in its middle."""
    with Nodes(trial.work / "logs" / "nodes.log") as nodes:
        trial.overrides.append(f"cluster.address={nodes.address}")
        trial.environment.update(nodes.environment)
        trial.start()
        trial.wait_for_step(trial.middle)
        back = trial.recovery(again=True)
        disturb(nodes)
        back()
        return trial.finish()
