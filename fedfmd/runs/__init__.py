"""What a run leaves behind, safe against crashes: its folder, rows, checkpoints and log lines."""

from fedfmd.runs.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    latest_round,
    load_model,
    save_checkpoint,
)
from fedfmd.runs.files import atomic_write, save_tensors
from fedfmd.runs.folder import RunFolder, environment, read_environment
from fedfmd.runs.provenance import code_digest
from fedfmd.runs.rows import (
    CLIENT_COLUMNS,
    EPOCH_COLUMNS,
    ROUND_COLUMNS,
    RUN_COLUMN,
    WALL_COLUMNS,
    ClientRow,
    EpochRow,
    RoundRow,
    csv_text,
    known,
    parse_round_line,
    read_clients,
    read_epochs,
    read_rounds,
    read_table,
    round_line,
)

__all__ = [
    "CLIENT_COLUMNS",
    "EPOCH_COLUMNS",
    "ROUND_COLUMNS",
    "RUN_COLUMN",
    "WALL_COLUMNS",
    "Checkpoint",
    "ClientRow",
    "EpochRow",
    "RoundRow",
    "RunFolder",
    "atomic_write",
    "code_digest",
    "csv_text",
    "environment",
    "known",
    "latest_checkpoint",
    "latest_round",
    "load_model",
    "parse_round_line",
    "read_clients",
    "read_environment",
    "read_epochs",
    "read_rounds",
    "read_table",
    "round_line",
    "save_checkpoint",
    "save_tensors",
]
