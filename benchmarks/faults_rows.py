"""The faults of `faults.py`, each as it is put into a training that runs."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil
from faults_nodes import Nodes
from faults_store import Store
from faults_trial import EVALUATION, HERE, TEACHER, WORKER, NotAvailable, Trial

from pipeline.recipe import Cluster
from pipeline.training.manifest import list_checkpoints, newest_verified

HANG_TIMEOUT_S = 30
OUTAGE_S = 60.0
FULL_S = 12.0
DISK_MB = 24


def kill_worker(trial: Trial, rank: int = 1) -> None:
    """SIGKILL to one of the two training workers."""
    trial.wait("two workers", lambda: len(trial.processes(WORKER)) == 2)
    trial.processes(WORKER)[rank].kill()


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


def half_written(trial: Trial) -> bool:
    trial.start()
    trial.wait_for_step(trial.middle)
    kill_in_save(trial)
    return trial.finish()


def kill_in_save(trial: Trial) -> None:
    """SIGKILL to both workers while a checkpoint is on its way; returns at the next new step."""
    folder = trial.run_dir / "checkpoints"
    while True:
        trial.wait("two workers", lambda: len(trial.processes(WORKER)) == 2)
        workers = trial.processes(WORKER)
        _spin("a save", lambda: any(folder.glob(".step_*.tmp")), trial)
        for worker in workers:
            worker.suspend()
        # Stopped, so that what is seen now is what the kill leaves.
        partial = list(folder.glob(".step_*.tmp"))
        if partial:
            break
        for worker in workers:
            worker.resume()
    back = trial.recovery()
    for worker in workers:
        worker.kill()
    trial.notes.append(f"{partial[0].name} was there, with {len(list(partial[0].iterdir()))} files")
    back()


def _spin(what: str, condition: Callable[[], bool], trial: Trial) -> None:
    """As `Trial.wait`, looking more often: a save of so small a model takes milliseconds."""
    while not condition():
        assert trial.process.poll() is None, f"ended before {what}"
        time.sleep(0.0005)


def damaged_newest(trial: Trial) -> bool:
    trial.start()
    trial.wait_for_step(trial.middle)
    back = trial.recovery()
    trial.process.send_signal(signal.SIGTERM)
    assert trial.end() == 75
    weights = newest_verified(trial.run_dir) / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    trial.notes.append(f"one bit of {weights.parent.name} was flipped")
    trial.start()
    back()
    return trial.finish()


def disk_full(trial: Trial) -> bool:
    """A small file system is filled up to the last byte, and emptied some seconds after."""
    run_dir = trial.run_dir
    run_dir.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(run_dir)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise NotAvailable("a small file system takes root and a kernel that mounts tmpfs")
    trial.mounted = run_dir
    trial.start()
    trial.wait_for_step(trial.middle)
    before = [path.name for path in list_checkpoints(run_dir)]
    back = trial.recovery(restarts=False)
    filler = run_dir / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    trial.wait("the log line", lambda: b"no space left" in trial.log.read_bytes())
    time.sleep(FULL_S)
    assert [path.name for path in list_checkpoints(run_dir)] == before
    assert newest_verified(run_dir).name == before[-1]
    filler.unlink()
    back()
    trial.notes.append(f"full for {FULL_S:.0f} s and more; {', '.join(before)} stayed whole")
    return trial.finish()


def _with_store(trial: Trial, fault: Callable[[Store], float]) -> bool:
    with Store(trial.work / "world" / "shards") as store:
        trial.overrides += [f"data.shards={store.url}", "data.reading.how=ranges"]
        trial.start()
        trial.wait_for_step(trial.middle)
        back = trial.recovery(restarts=False)
        seconds = fault(store)
        back()
        trial.seconds[-1] -= seconds
        trial.notes.append(f"{store.requests} requests, {store.failed} of them failed")
        return trial.finish()


def store_slow(trial: Trial) -> bool:
    def fault(store: Store) -> float:
        store.latency = 3.0
        trial.notes.append("each answer after 3 s, to the end")
        return 0.0

    return _with_store(trial, fault)


def store_errors(trial: Trial) -> bool:
    def fault(store: Store) -> float:
        trial.notes.append(f"every answer is 500 for {OUTAGE_S / 3:.0f} s")
        store.status = 500
        time.sleep(OUTAGE_S / 3)
        store.status = None
        return OUTAGE_S / 3

    return _with_store(trial, fault)


def store_gone(trial: Trial) -> bool:
    def fault(store: Store) -> float:
        trial.notes.append(f"nobody listens for {OUTAGE_S:.0f} s; seconds are from its end")
        store.leave()
        time.sleep(OUTAGE_S)
        store.come_back()
        return OUTAGE_S

    return _with_store(trial, fault)


def teacher_lost(trial: Trial) -> bool:
    trial.overrides.append("teacher.placement=pool")
    trial.start()
    trial.wait_for_step(trial.middle)
    trial.wait("a teacher", lambda: trial.processes(TEACHER))
    back = trial.recovery(restarts=False)
    trial.processes(TEACHER)[0].kill()
    back()
    return trial.finish()


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
    """One of two nodes dies with all that runs on it; later another one joins."""
    with Nodes(trial.work / "logs" / "nodes.log") as nodes:
        trial.overrides.append(f"cluster.address={nodes.address}")
        trial.environment["RAY_AUTH_TOKEN"] = nodes.token
        trial.start()
        trial.wait_for_step(trial.middle)
        back = trial.recovery(again=True)
        nodes.lose()
        nodes.add()
        back()
        return trial.finish()


def unmount(trial: Trial) -> None:
    """Let go of the small file system of `disk_full`, with the run on it."""
    if trial.mounted is not None:
        subprocess.run(["umount", "--lazy", str(trial.mounted)], check=False)


@dataclass(frozen=True)
class Row:
    """A fault of the table."""

    name: str
    title: str
    run: Callable[[Trial], bool]


ROWS = (
    Row("worker_killed", "worker killed", worker_killed),
    Row("driver_killed", "driver killed, same command again", driver_killed),
    Row("sigterm", "SIGTERM, same command again", sigterm),
    Row("rank_hangs", "a rank hangs", rank_hangs),
    Row("nan_loss", "NaN loss, then a worker killed", nan_loss),
    Row("out_of_memory", "out of memory", out_of_memory),
    Row("half_written", "checkpoint half-written", half_written),
    Row("damaged_newest", "newest checkpoint damaged", damaged_newest),
    Row("disk_full", "disk full while saving", disk_full),
    Row("store_slow", "object store slow", store_slow),
    Row("store_errors", "object store answers 500", store_errors),
    Row("store_gone", "object store gone for a minute", store_gone),
    Row("teacher_lost", "teacher actor lost", teacher_lost),
    Row("evaluation_lost", "evaluation task lost", evaluation_lost),
    Row("node_lost", "node lost, another joins", node_lost),
)
