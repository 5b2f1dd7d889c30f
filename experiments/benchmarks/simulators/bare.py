"""A plain PyTorch loop over clients, in processes of a core each: ``bare.py WORK TIMES [kept]``.

Every client gets a fresh copy of the network; with `kept` all train the same one, in a process that keeps the memory
that it frees. No weights are sent or averaged, nothing is tested or written.
"""

from __future__ import annotations

import copy
import sys
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier

import torch
from work import Work, clock, load_shards

from fedfmd.memory import keep_freed


def loop(rank: int, work: Work, times: str, kept: bool, together: Barrier) -> None:
    torch.set_num_threads(1)
    if kept:
        keep_freed()
    model, mine, over = work.network(), load_shards(work)[rank :: work.workers], clock(times)
    for _ in range(work.rounds):
        for images, labels in mine:
            work.train(model if kept else copy.deepcopy(model), images, labels)
        together.wait()
        if rank == 0:
            over()


def main(path: str, times: str, *kept: str) -> None:
    work, spawn = Work.read(path), get_context("spawn")
    together = spawn.Barrier(work.workers)
    processes = [
        spawn.Process(target=loop, args=(rank, work, times, bool(kept), together))
        for rank in range(work.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main(*sys.argv[1:])
