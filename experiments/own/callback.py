"""A callback of one's own: a line for each round in `progress.txt`, in the run's folder."""

from collections.abc import Sequence

from fedfmd.tracking import Callback, ClientRow, RoundRow, TrackedRun


class Progress(Callback):
    def run_started(self, run: TrackedRun) -> None:
        self.path = run.folder / "progress.txt"

    def round_ended(self, row: RoundRow, clients: Sequence[ClientRow]) -> None:
        slowest = max(clients, key=lambda client: client.total_s)
        with self.path.open("a") as file:
            file.write(f"round {row.round}: {row.accuracy:.1%}, client {slowest.client} was the slowest\n")
