"""The faults of `faults.py`, in the order of its table."""

from collections.abc import Callable
from dataclasses import dataclass

import faults_processes as processes
import faults_storage as storage
from faults_trial import Trial


@dataclass(frozen=True)
class Row:
    """A fault of the table."""

    name: str
    title: str
    run: Callable[[Trial], bool]


ROWS = (
    Row("worker_killed", "worker killed", processes.worker_killed),
    Row("driver_killed", "driver killed, same command again", processes.driver_killed),
    Row("sigterm", "SIGTERM, same command again", processes.sigterm),
    Row("rank_hangs", "a rank hangs", processes.rank_hangs),
    Row("nan_loss", "NaN loss, then a worker killed", processes.nan_loss),
    Row("out_of_memory", "out of memory", processes.out_of_memory),
    Row("half_written", "checkpoint half-written", storage.half_written),
    Row("damaged_newest", "newest checkpoint damaged", storage.damaged_newest),
    Row("disk_full", "disk full while saving", storage.disk_full),
    Row("store_slow", "object store slow", storage.store_slow),
    Row("store_errors", "object store answers 500", storage.store_errors),
    Row("store_gone", "object store gone for a minute", storage.store_gone),
    Row("teacher_lost", "teacher actor lost", processes.teacher_lost),
    Row("evaluation_lost", "evaluation task lost", processes.evaluation_lost),
    Row("node_lost", "node lost, another joins", processes.node_lost),
    Row("node_preempted", "node to be taken away, another joins", processes.node_preempted),
)
