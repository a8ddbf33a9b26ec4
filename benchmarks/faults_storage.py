"""Faults of checkpoints, disks and object stores, for `faults.py`."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

from faults_store import Store
from faults_trial import WORKER, NotAvailable, Trial

from pipeline.training.manifest import list_checkpoints, newest_verified

OUTAGE_S = 60.0
SLOW_S = 3.0
STEPS_AHEAD = 5
"""Steps whose samples are there or asked for, at most, with one request at a time."""
FULL_S = 12.0
DISK_MB = 24
LEFT_BYTES = 200_000


def half_written(trial: Trial) -> bool:
    trial.start()
    trial.wait_for_step(trial.middle)
    kill_in_save(trial)
    return trial.finish()


def kill_in_save(trial: Trial) -> None:
    """SIGKILL to both workers while a checkpoint is on its way; returns at the next new step."""
    folder = trial.run_dir / "checkpoints"
    left = set(folder.glob(".step_*.tmp"))
    """By an earlier kill; a save has a new name each time."""
    while True:
        trial.wait("two workers", lambda: len(trial.processes(WORKER)) == 2)
        workers = trial.processes(WORKER)
        _spin("a save", lambda: set(folder.glob(".step_*.tmp")) - left, trial)
        for worker in workers:
            worker.suspend()
        # Stopped, so that what is seen now is what the kill leaves.
        partial = sorted(set(folder.glob(".step_*.tmp")) - left)
        if partial:
            break
        for worker in workers:
            worker.resume()
    back = trial.recovery()
    for worker in workers:
        worker.kill()
    trial.notes.append(f"{partial[0].name} was there, with {len(list(partial[0].iterdir()))} files")
    back()


def _spin(what: str, condition: Callable[[], object], trial: Trial) -> None:
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
    """A small file system has room for lines of the log and not for a checkpoint, for a while."""
    run_dir = trial.run_dir
    run_dir.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(run_dir)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise NotAvailable("a small file system takes root and a kernel that mounts tmpfs")
    trial.mounted = run_dir
    trial.start()
    trial.wait_for_step(trial.middle)
    before = [path.name for path in list_checkpoints(run_dir)]
    filler = run_dir / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(run_dir).free - LEFT_BYTES))
    trial.wait("the log line", lambda: b"no space left: " in trial.log.read_bytes())
    time.sleep(FULL_S)
    assert [path.name for path in list_checkpoints(run_dir)] == before
    assert newest_verified(run_dir).name == before[-1]
    back = trial.recovery(restarts=False)
    filler.unlink()
    back()
    trial.notes.append(
        f"full for {FULL_S:.0f} s and more; {', '.join(before)} stayed whole; seconds are from its "
        "end, the wait under way included"
    )
    return trial.finish()


def _with_store(trial: Trial, fault: Callable[[Store], None]) -> bool:
    """Shards come from a store, to which `fault` happens in mid-training."""
    with Store(trial.work / "world" / "shards") as store:
        # One request at a time, so that little of what is left of so short a run is there already.
        trial.overrides += [
            f"data.shards={store.url}", "data.reading.how=ranges", "data.reading.in_flight=1",
        ]  # fmt: skip
        trial.start()
        trial.wait_for_step(trial.middle)
        fault(store)
        trial.notes.append(f"{store.failed} of {store.requests} requests failed")
        return trial.finish()


def store_slow(trial: Trial) -> bool:
    """Each answer comes late, until a step was made of what was asked for since."""

    def fault(store: Store) -> None:
        back = trial.recovery(restarts=False, under_way=STEPS_AHEAD)
        store.be_slow(SLOW_S)
        back()
        store.be_slow(0.0)
        assert trial.seconds[-1] > SLOW_S, trial.seconds
        trial.notes.append(
            f"each answer took {SLOW_S:.0f} s; seconds are those of {STEPS_AHEAD + 1} steps"
        )

    return _with_store(trial, fault)


def _outage(
    trial: Trial, begin: Callable[[Store], None], end: Callable[[Store], None]
) -> Callable[[Store], None]:
    """A fault that ends after a while, in which all that was read ahead is used up."""

    def fault(store: Store) -> None:
        begin(store)
        time.sleep(OUTAGE_S)
        back = trial.recovery(restarts=False)
        end(store)
        back()
        trial.notes.append(f"for {OUTAGE_S:.0f} s, and seconds are from its end")

    return fault


def store_errors(trial: Trial) -> bool:
    """Every answer is 500."""
    return _with_store(
        trial, _outage(trial, lambda store: store.answer_with(500), Store.answer_files)
    )


def store_gone(trial: Trial) -> bool:
    """Nobody listens."""
    return _with_store(trial, _outage(trial, Store.leave, Store.come_back))


def unmount(trial: Trial) -> None:
    """Let go of the small file system of `disk_full`, with the run on it."""
    if trial.mounted is not None:
        subprocess.run(["umount", "--lazy", str(trial.mounted)], check=False)
