"""What a run leaves behind, safe against crashes: its folder, rows, checkpoints and log lines."""

from fedfmd.tracking.checkpoint import Checkpoint, latest_checkpoint, load_model, save_checkpoint
from fedfmd.tracking.files import atomic_write
from fedfmd.tracking.folder import RunFolder
from fedfmd.tracking.rows import (
    CLIENT_COLUMNS,
    ROUND_COLUMNS,
    WALL_COLUMNS,
    ClientRow,
    RoundRow,
    parse_round_line,
    read_clients,
    read_rounds,
    round_line,
)

__all__ = [
    "CLIENT_COLUMNS",
    "ROUND_COLUMNS",
    "WALL_COLUMNS",
    "Checkpoint",
    "ClientRow",
    "RoundRow",
    "RunFolder",
    "atomic_write",
    "latest_checkpoint",
    "load_model",
    "parse_round_line",
    "read_clients",
    "read_rounds",
    "round_line",
    "save_checkpoint",
]
