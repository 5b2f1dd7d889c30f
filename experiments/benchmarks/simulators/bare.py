"""A plain PyTorch loop over clients, in processes of a core each: ``bare.py WORK TIMES fresh|kept``.

Every client gets a fresh copy of the network; or all train the one that is kept, in processes that also keep the memory
that they free. No weights are sent or averaged, nothing is tested or written.

With ``-`` for TIMES it does a round for every line that comes in, and answers with the seconds that it took.
"""

from __future__ import annotations

import copy
import sys
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier

import torch
from work import Work, clock, load_shards

from fedfmd.memory import keep_freed


def train(rank: int, work: Work, kept: bool, start: Barrier, end: Barrier) -> None:
    """Train this process's share of the clients, in round after round."""
    torch.set_num_threads(1)
    if kept:
        keep_freed()
    model, mine = work.network(), load_shards(work)[rank :: work.workers]
    while True:
        start.wait()
        for images, labels in mine:
            work.train(model if kept else copy.deepcopy(model), images, labels)
        end.wait()


def main(path: str, times: str, model: str) -> None:
    work, spawn = Work.read(path), get_context("spawn")
    start, end = spawn.Barrier(work.workers + 1), spawn.Barrier(work.workers + 1)
    for rank in range(work.workers):
        spawn.Process(target=train, args=(rank, work, model == "kept", start, end), daemon=True).start()
    if times == "-":
        for _ in sys.stdin:
            began = time.perf_counter()
            start.wait()
            end.wait()
            print(time.perf_counter() - began, flush=True)
        return
    over = clock(times)
    for _ in range(work.rounds):
        start.wait()
        end.wait()
        over()


if __name__ == "__main__":
    main(*sys.argv[1:])
