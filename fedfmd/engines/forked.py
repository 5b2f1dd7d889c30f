"""Nodes in processes of their own, forked from this one.

Threads of one process wait for each other's Python, which takes a good part of a small network's step. A fork starts at
once and shares all that is loaded already, images above all. It is safe for the reason that it is in PyTorch's data
loaders: a node computes on one thread, and so needs none of the others, which a fork loses.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch
from flwr.app import Message

from fedfmd.errors import RunError
from fedfmd.processes import Outlet, cause_of_death, end_with_parent, ignoring_interrupts, log_to

ALIGNMENT = 64
"""Bytes at whose multiples arrays begin, as NumPy and PyTorch have them."""

Answer = Callable[[Message], Message]


def can_fork(device: torch.device, threads: int) -> bool:
    """Tell whether nodes on `device` with so many threads can be forked; CUDA and OpenMP don't survive it.

    Nor does autograd once `torch.compile` has trained in this process
    (https://github.com/pytorch/pytorch/wiki/Autograd-and-Fork), of which only a try can tell.
    """
    return sys.platform == "linux" and device.type == "cpu" and threads == 1 and _fork_can_train()


def _fork_can_train() -> bool:
    tried = multiprocessing.get_context("fork").Process(target=_compute_a_gradient)
    with ignoring_interrupts(), _without_thread_warnings():
        tried.start()
    tried.join()
    return tried.exitcode == 0


def _compute_a_gradient() -> None:
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError:
        sys.exit(1)


@contextmanager
def _without_thread_warnings() -> Iterator[None]:
    """Silence what Python says of a fork beside threads, such as a progress bar's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class ForkedNode:
    """A process that answers messages as `answer` does, with what this one has loaded when the node is made.

    It ends when it is closed, or this process ends, in whatever way.
    """

    def __init__(self, answer: Answer) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(answer, other, os.getpid()))
        with ignoring_interrupts(), _without_thread_warnings():
            self._process.start()
        other.close()  # so that the pipe breaks when the process dies

    def __call__(self, message: Message) -> Message:
        """Return the node's answer; what it logs meanwhile is logged here.

        Raises:
            RunError: its process died.
        """
        try:
            _send(self._connection, message)
            while isinstance(told := self._connection.recv(), logging.LogRecord):
                logging.getLogger(told.name).handle(told)
            return _received(self._connection, told)
        except (EOFError, ConnectionError):
            self._process.join()
            raise RunError(
                f"a node is gone, {cause_of_death(self._process.exitcode or 0)}; finished rounds are kept, run the "
                "same command again to go on"
            ) from None

    def close(self) -> None:
        """Kill the process: what it has written stays whole, as after any crash."""
        self._process.kill()
        self._process.join()


def _serve(answer: Answer, connection: Connection, parent: int) -> None:
    """Answer what comes through the connection until the parent is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    if os.getppid() != parent:  # it died before
        os._exit(1)
    torch.set_num_threads(1)
    log_to(Outlet(connection))
    while True:
        _send(connection, answer(_received(connection, connection.recv())))


@dataclass(frozen=True)
class _Parcel:
    """A message without its arrays, and how many bytes each of these has in the memory that comes after it."""

    pickled: bytes
    sizes: tuple[int, ...]

    @property
    def places(self) -> list[int]:
        """Where each array begins in that memory, and where it ends."""
        return list(accumulate((size + -size % ALIGNMENT for size in self.sizes), initial=0))


def _send(connection: Connection, message: Message) -> None:
    """Send a message; arrays go through memory that the other process maps, and are copied once."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    parcel = _Parcel(pickled, tuple(array.nbytes for array in arrays))
    connection.send(parcel)
    if any(parcel.sizes):
        with open(os.memfd_create("fedfmd"), "wb") as memory:  # noqa: PTH123 - not a path
            for place, array in zip(parcel.places, arrays, strict=False):
                memory.seek(place)
                memory.write(array)
            memory.truncate(parcel.places[-1])
            send_handle(connection, memory.fileno(), None)


def _received(connection: Connection, parcel: Any) -> Message:
    """Return the message of a parcel that came through the connection; its arrays can't be written to."""
    assert isinstance(parcel, _Parcel)
    content = memoryview(b"")
    if any(parcel.sizes):
        handle = recv_handle(connection)
        content = memoryview(mmap.mmap(handle, parcel.places[-1], access=mmap.ACCESS_READ))
        os.close(handle)
    arrays = [content[place : place + size] for place, size in zip(parcel.places, parcel.sizes, strict=False)]
    message: Message = pickle.loads(parcel.pickled, buffers=arrays)
    return message
