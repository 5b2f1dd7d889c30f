"""Jobs in processes of their own, several at a time, whose log records come back.

Processes, because Flower's task identity and PyTorch's number of threads belong to a process; spawned ones,
because they may compute on several threads of PyTorch, which don't survive a fork.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import TypeVar

from fedfmd.errors import FedfmdError, one_line
from fedfmd.processes import Outlet, cause_of_death, ignoring_interrupts, log_to

Job = TypeVar("Job")
logger = logging.getLogger("fedfmd")


@dataclass(frozen=True)
class Started:
    """A process has taken the job."""


@dataclass(frozen=True)
class Ended:
    """The job is over; `error` says in one line why it failed, "" if it did not."""

    error: str = ""


Event = Started | logging.LogRecord | Ended


def run_jobs(
    work: Callable[[Job], None], jobs: Iterable[Job], processes: int
) -> Generator[tuple[Job, Event], None, None]:
    """Do all jobs, `processes` at a time, and tell what happens: start, records of ``fedfmd`` loggers, end.

    `work` is a function of a module. A job that raises, or whose process dies, does not stop the others. Close
    the iterator to end all processes at once; they also end when this process does, in whatever way.
    """
    waiting, idle, busy = deque(jobs), list[_Worker](), dict[object, tuple[_Worker, Job]]()
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                worker, job = idle.pop() if idle else _Worker(work), waiting.popleft()
                worker.connection.send(job)
                busy[worker.connection] = worker, job
                yield job, Started()
            for connection in wait([worker.connection for worker, _ in busy.values()]):
                worker, job = busy[connection]
                event = worker.receive()
                if isinstance(event, Ended):
                    del busy[connection]
                    idle += [worker] if worker.process.is_alive() else []
                yield job, event
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.end()


class _Worker:
    """A process that does one job after another."""

    def __init__(self, work: Callable[[Job], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, other))
        with ignoring_interrupts(), _without_main():
            self.process.start()
        other.close()  # so that the pipe breaks when the process dies

    def receive(self) -> logging.LogRecord | Ended:
        try:
            event: logging.LogRecord | Ended = self.connection.recv()
            return event
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Ended(cause_of_death(self.process.exitcode or 0))

    def end(self) -> None:
        """Kill the process: what it has written stays whole, as after any crash."""
        self.process.kill()
        self.process.join()


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module: a spawned process would run a script again that has no ``if __name__ == "__main__"``."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(work: Callable[[Job], None], connection: Connection) -> None:
    """Do the jobs that come through the connection until the parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outlet = Outlet(connection)
    log_to(outlet)
    logger.setLevel(logging.DEBUG)
    while True:
        outlet.put_nowait(attempt(work, connection.recv()))


def attempt(work: Callable[[Job], None], job: Job) -> Ended:
    """Do a job in this process; the traceback of an error that nobody foresaw goes to the log."""
    try:
        work(job)
    except Exception as error:
        if not isinstance(error, FedfmdError | OSError):
            logger.exception("unexpected")
        return Ended(one_line(error))
    return Ended()


def _end_with_parent() -> None:
    """Wait until the parent is gone, killed perhaps, and leave at once, in the middle of a round if need be."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
