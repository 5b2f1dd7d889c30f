"""TensorBoard: curves, settings and pictures in the folder ``tensorboard`` of the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fedfmd.runs import ClientRow, EpochRow, RoundRow
from fedfmd.tracking.callback import RunEnd, TrackedRun, numbers

FOLDER = "tensorboard"


class TensorBoard:
    """Writes a scalar for each number of a row, at the step of its round."""

    def run_started(self, run: TrackedRun) -> None:
        """Open the folder; what was written of rounds that nobody was told of is discarded."""
        self._writer = SummaryWriter(run.folder / FOLDER, purge_step=run.told + 1)
        self._round = run.told
        lines = [f"    {key}: {value}" for key, value in run.settings.kept().items()]
        self._writer.add_text("settings", "\n".join(lines), 0)

    def round_ended(self, row: RoundRow | EpochRow, clients: Sequence[ClientRow]) -> None:
        """Write the numbers, and see to it that they reach the disk."""
        self._round = row.round
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row.round)
        self._writer.flush()

    def run_ended(self, end: RunEnd) -> None:
        """Add the pictures."""
        for path in end.pictures:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(path.stem, pixels, self._round, dataformats="HWC")
        self._writer.close()
