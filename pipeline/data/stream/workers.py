"""Readings made ahead of their use, in the order of their jobs: by processes or by a thread."""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from pipeline.data.stream.packing import NO_SLAB, PackedReading, Slabs, pack, unpack
from pipeline.data.stream.reader import Reading
from pipeline.errors import LongtailError

logger = logging.getLogger(__name__)

END_S = 5.0
"""How long a reader process may take to end."""
MAX_RESTARTS = 3
"""How often in a row reader processes are begun anew without having read anything."""

Job = TypeVar("Job")
AnyJob = TypeVar("AnyJob", contravariant=True)


class Reader(Protocol[AnyJob]):
    """Picklable, and gives the reading of a job."""

    def read(self, job: AnyJob, memory: Tensor | None = None, /) -> Reading:
        """The reading, with its images in `memory`, (n,) uint8, where they fit there."""

    def expect(self, job: AnyJob, /) -> None:
        """Begin to fetch what a job needs that will come."""

    def close(self) -> None:
        """Stop fetching, and close files."""


@dataclass(frozen=True)
class Ahead:
    """How far reading goes before what is used.

    `readings` are finished ahead of use, in all. `fetches` jobs of each process have their bytes
    on the way before they are read. `num_bytes` is the most that the images and masks of a reading
    take; larger ones cost more to hand over. `held` readings stay in use besides the newest ones.
    """

    readings: int
    fetches: int = 0
    num_bytes: int = 0
    held: int = 0

    def tasks_of_each(self, workers: int) -> int:
        """Tasks that each of so many processes has been given and not brought back."""
        return max(2, -(-2 * self.readings // workers))

    def num_slabs(self, workers: int) -> int:
        """Slabs that readings are in: of those that are made, of those in use, and of as many that
        are let go late."""
        return self.tasks_of_each(workers) * workers + 2 * self.readings + self.held + 1


@dataclass(frozen=True)
class _Task(Generic[Job]):
    """A job with those that the same process will get later, and the slab for its pixels."""

    number: int
    job: Job
    later: Sequence[Job]
    slab: int


def read_ahead(
    reader: Reader[Job], jobs: Iterable[Job], *, workers: int, ahead: Ahead
) -> Generator[Reading]:
    """`reader.read(job)` of each job in order, while the next ones are already being read.

    With `workers` the reading is done in so many processes, else in one thread. Reader processes
    that are killed are begun anew with the jobs that have not come back, so nothing is lost or
    read twice; raises `LongtailError` when that does not help.
    """
    pin_memory = torch.cuda.is_available()
    if not workers:
        yield from _read_in_thread(reader, jobs, ahead, pin_memory)
        return
    missing: deque[Job] = deque()
    rest, failures = iter(jobs), 0
    while True:
        again = chain(tuple(missing), rest)
        missing.clear()
        try:
            for reading in _read_in_processes(reader, again, missing, workers, ahead, pin_memory):
                missing.popleft()
                failures = 0
                yield reading
            return
        except _WorkerGone as error:
            failures += 1
            if failures > MAX_RESTARTS:
                raise LongtailError(
                    f"reader processes were killed {failures} times without having read anything "
                    f"({error}); the memory may be too small for data.workers {workers}: set "
                    "fewer, or 0, and run the same command again"
                ) from error
            logger.warning("%s; its samples are read again by new processes", error)


def _read_in_processes(
    reader: Reader[Job],
    jobs: Iterable[Job],
    missing: deque[Job],
    workers: int,
    ahead: Ahead,
    pin_memory: bool,
) -> Generator[Reading]:
    """Readings of one set of processes; `missing` has the jobs taken up and not come back."""
    # Not fork: the training process has threads (Ray, gloo, CUDA). The server imports torch once
    # for all of its children.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    last = -1
    given = ahead.tasks_of_each(workers) * workers
    slabs = Slabs(ahead.num_slabs(workers), ahead.num_bytes)
    tasks = _tasks(jobs, missing, workers, ahead.fetches, slabs)
    pool = [_Worker(context, reader, slabs) for _ in range(workers)]
    try:
        for task in islice(tasks, given):
            pool[task.number % workers].send(task)
            last = task.number
        for number in count():
            if number > last:
                return
            packed = pool[number % workers].receive()
            for task in islice(tasks, 1):
                pool[task.number % workers].send(task)
                last = task.number
            yield unpack(packed, slabs, pin_memory=pin_memory)
    finally:
        for worker in pool:
            worker.hang_up()
        for worker in pool:
            worker.end()


class _WorkerGone(Exception):  # noqa: N818 - it is caught here and never shown as an error
    """A reader process ended without having been asked to."""


class _Worker(Generic[Job]):
    """A reader process, and the pipe to it.

    Its tasks and their readings pass in order, without the queues and threads of a DataLoader,
    which cost as much for each batch as collating it.
    """

    def __init__(self, context: BaseContext, reader: Reader[Job], slabs: Slabs) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_work,
            args=(reader, slabs, theirs, dict(os.environ)),
            name="reader",
            daemon=True,
        )
        self._process.start()
        theirs.close()

    def send(self, task: "_Task[Job]") -> None:
        """Give it a task, which it does after those before."""
        try:
            self._pipe.send(task)
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> PackedReading:
        """The packed reading of its earliest task that has not come back."""
        try:
            # The end of a process ends its pipe: nobody else has the other end.
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if isinstance(answer, str):
            raise RuntimeError(f"a reader process failed:\n{answer}")
        return cast(PackedReading, answer)

    def hang_up(self) -> None:
        """Let it end."""
        self._pipe.close()

    def end(self) -> None:
        """Wait until it has ended, not for long."""
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _gone(self) -> _WorkerGone:
        self._process.join(1.0)
        code = self._process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return _WorkerGone(f"reader process {self._process.pid} ended unexpectedly ({how})")


def _work(
    reader: Reader[Job], slabs: Slabs, pipe: Connection, environment: Mapping[str, str]
) -> None:
    """What a reader process does until its training process hangs up."""
    # The server has the variables of when it was begun, and storage reads its credentials there.
    os.environ.clear()
    os.environ.update(environment)
    # Who asks a run to stop asks the training process; that needs its readers for a while yet.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _exit_with_parent()
    with suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            try:
                for job in (task.job, *task.later):
                    reader.expect(job)
                reading = reader.read(task.job, slabs.memory(task.slab))
                answer: PackedReading | str = pack(reading, slabs, task.slab)
            except Exception:
                answer = traceback.format_exc()
            pipe.send(answer)
    reader.close()


def _tasks(
    jobs: Iterable[Job], missing: deque[Job], workers: int, fetches: int, slabs: Slabs | None
) -> Iterator[_Task[Job]]:
    """Tasks for processes that take turns, each with the jobs `fetches` turns later."""
    source, waiting = iter(jobs), deque[Job]()
    for number in count():
        for job in source:
            missing.append(job)
            waiting.append(job)
            if len(waiting) > fetches * workers:
                break
        if not waiting:
            return
        job = waiting.popleft()
        # Those between were named with the process's tasks before; with its first, all are.
        turns = range(1 if number < workers else fetches, fetches + 1)
        places = (turn * workers - 1 for turn in turns if turn)
        later = [waiting[place] for place in places if place < len(waiting)]
        yield _Task(number, job, later, NO_SLAB if slabs is None else slabs.take())


def _exit_with_parent() -> None:
    """End a reader process when the training process is killed, whatever it is reading.

    The process above it is the server, which stays as long as it has readers.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _read_in_thread(
    reader: Reader[Job], jobs: Iterable[Job], ahead: Ahead, pin_memory: bool
) -> Generator[Reading]:
    def read(task: _Task[Job]) -> Reading:
        for job in (task.job, *task.later):
            reader.expect(job)
        reading = reader.read(task.job)
        return reading.pin_memory() if pin_memory else reading

    waiting: deque[Future[Reading]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="reader")
    try:
        for task in _tasks(jobs, deque(maxlen=0), 1, ahead.fetches, None):
            waiting.append(pool.submit(read, task))
            if len(waiting) > ahead.readings:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()
