"""What processes that do a part of this one's work have in common: their logs, interrupts, and how they ended."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection

logger = logging.getLogger("fedfmd")

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Outlet:
    """A connection as the queue into which a `QueueHandler` puts records, formatted, without their arguments."""

    def __init__(self, connection: Connection) -> None:
        self._send, self.get = connection.send, connection.recv

    def put_nowait(self, record: object) -> None:
        """Send a record; without a parent that could read it, end."""
        try:
            self._send(record)
        except OSError:
            os._exit(1)


def log_to(outlet: Outlet) -> None:
    """Have what ``fedfmd`` loggers tell in this process go to the outlet alone."""
    for handler in logger.handlers[:]:  # those of the process that it was forked from
        logger.removeHandler(handler)
    logger.addHandler(QueueHandler(outlet))
    logger.propagate = False


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which a terminal sends to all of them: this one handles it.

    Only a main thread can; others don't get it either.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def end_with_parent() -> None:
    """Have this process killed when the one that forked it ends, in whatever way (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def cause_of_death(exit_code: int) -> str:
    """Tell how a process ended."""
    if exit_code == -signal.SIGKILL:
        return "its process was killed, by the system perhaps for lack of memory: use fewer --workers"
    how = f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit status {exit_code}"
    return f"its process ended {how}"
