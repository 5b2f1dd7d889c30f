"""What a client keeps between its rounds, on the disk of the machine that hosts it.

Any process may host a client in its next round, so that nothing can stay in memory. A resumed run finds the
states that clients had at its checkpoint: those of later rounds belong to a course given up.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedfmd.runs import load_model, save_tensors

DAYS_KEPT = 30


@dataclass(frozen=True)
class ClientState:
    """Arrays by name: what the algorithm keeps on the client, and what rounding left over of its updates."""

    own: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientStates:
    """The states of a run's clients, in a folder of the run's own.

    Kept is the newest state of a client, and the newest up to each checkpoint that the run may be resumed from.
    FedBuff numbers its messages, not its rounds, which is why clients may keep something there only if every round
    has a checkpoint.
    """

    folder: Path
    checkpoint_every: int = 1
    keep_checkpoints: int = 2

    def load(self, client: int, before_round: int) -> ClientState:
        """Load the client's newest state of an earlier round; an empty one if it has none.

        Raises:
            ValueError: its file is damaged.
        """
        earlier = [round for round in self._rounds(client) if round < before_round]
        if not earlier:
            return ClientState()
        tensors, _ = load_model(self._path(client, max(earlier)))
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            kinds.setdefault(kind, {})[name] = tensor
        return ClientState(**kinds)

    def save(self, client: int, round: int, state: ClientState) -> None:
        """Keep the client's state after a round, and delete those that nobody can come back to.

        Raises:
            OSError: it can't be written.
        """
        path = self._path(client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{kind}/{name}": tensor for kind, group in vars(state).items() for name, tensor in group.items()
        }
        save_tensors(path, tensors, {})
        newest = (round - 1) // self.checkpoint_every * self.checkpoint_every
        checkpoints = [newest - place * self.checkpoint_every for place in range(self.keep_checkpoints)]
        rounds = self._rounds(client)
        kept = {max((r for r in rounds if r <= limit), default=round) for limit in (round, *checkpoints)}
        for stale in set(rounds) - kept:
            self._path(client, stale).unlink()

    def _path(self, client: int, round: int) -> Path:
        return self.folder / f"client-{client:05d}" / f"round-{round:05d}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        files = self._path(client, 0).parent.glob("round-*.safetensors")
        return [int(path.stem.removeprefix("round-")) for path in files]


def states_of_run(root: Path, run: str, checkpoint_every: int, keep_checkpoints: int) -> ClientStates:
    """Return the states of the clients of `run` below `root`.

    Raises:
        ValueError: `run` is no plain name, so nothing can be kept.
    """
    if not re.fullmatch(r"[\w-]+", run):
        raise ValueError(
            f"run = {run!r} must name the run, in letters, digits, - and _, for clients to keep state"
        )
    return ClientStates(root / run, checkpoint_every, keep_checkpoints)


def discard_old(root: Path, days: float = DAYS_KEPT) -> None:
    """Delete the states of the runs below `root` whose clients have kept nothing for so many days."""
    oldest = time.time() - days * 24 * 3600
    for run in root.glob("*"):
        with suppress(FileNotFoundError):  # another process deletes it too
            if all(path.stat().st_mtime < oldest for path in (run, *run.iterdir())):
                shutil.rmtree(run, ignore_errors=True)
