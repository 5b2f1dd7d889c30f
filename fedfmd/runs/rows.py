"""The rows of rounds.csv, clients.csv and epochs.csv: their columns, their text, and how they are read back.

A field's place in its class is its column's place. A value that does not exist (the loss of a client that did
not train, the temperature of a static network) is None, an empty cell. Floats keep ten digits.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One round of the server. Seconds are virtual but for `wall_s`; energy in joules; accuracy in [0, 1].

    Attributes:
        round: its number.
        virtual_s: virtual time at the end of the round.
        round_s: virtual seconds of this round.
        wall_s: seconds that this machine needed.
        loss, accuracy: of the global model on the test set; like validation, entropy and the four scores None in
            rounds whose model was not tested (``server.evaluate-every``).
        best_accuracy: test accuracy of the round whose validation accuracy was the highest so far; without
            validation images the highest test accuracy so far, which was then chosen on test images.
        validation_loss, validation_accuracy: of the global model on the validation images; None without them.
        temperature: of the kernel attention.
        kernel_entropy: mean over dynamic layers and samples of H(π)/ln K.
        train_flops: of all clients in this round, late ones included; `cum_train_flops` since the start.
        up_bytes, down_bytes, energy_j: sums over the clients.
        latency_s: modelled seconds of inference per image, mean over the clients.
        ies_train, rcs_train: round_s / accuracy, accuracy / round_s.
        ies_infer, rcs_infer: latency_s / accuracy, accuracy / latency_s.
        status: ok, or discarded: too few updates came, and the model stayed as it was.
        clients_cut: clients that were to do fewer steps, or train fewer kernels, than without limits.
        epsilon: ε of differential privacy after the round, at ``privacy.delta``; None without, infinite without noise.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="strings")

    round: int
    virtual_s: float
    round_s: float
    wall_s: float
    loss: float | None = None
    accuracy: float | None = None
    best_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    temperature: float | None = None
    kernel_entropy: float | None = None
    clients_ok: int
    clients_late: int
    clients_failed: int
    train_flops: int
    cum_train_flops: int
    up_bytes: int
    down_bytes: int
    energy_j: float
    latency_s: float | None = None
    ies_train: float | None = None
    rcs_train: float | None = None
    ies_infer: float | None = None
    rcs_infer: float | None = None
    status: str = "ok"
    clients_cut: int | None = None
    epsilon: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRow:
    """One client in one round. Energy in joules; accuracy in [0, 1]; seconds are virtual but for `WALL_COLUMNS`.

    On edge devices compare compute_s with wall_s, down_s + up_s with measured_transfer_s, and latency_s with
    measured_latency_s.

    Attributes:
        round, client: its key.
        node: place of the worker that hosted the client; None if none did.
        device: name of the device profile.
        status: ok, late, failed or unfit; `reason` says why it is not ok, or how its update was limited.
        examples, steps: images and local steps of the plan.
        kernels: kernels of each bank that are trained; 1 without banks.
        train_flops: of this round; `cum_train_flops` since the start.
        compute_s, down_s, up_s, total_s: by the device and link model.
        wall_s: seconds that the machine which hosted the client needed for it, from the global arrays to its update.
        loss, accuracy: met while the client trained, mean over the images of all its steps: of a model that changes
            from step to step, on the very images that it learns from, augmented; the loss is the one minimised.
        latency_s: modelled seconds of inference per image on its device.
        ies, rcs: latency_s / accuracy, accuracy / latency_s.
        kernel_entropy: mean over dynamic layers and images of H(π)/ln K; like the next two, over the images of
            its last eight local steps at most, and None where the operator has no such attention.
        input_attention, output_attention: means over layers, images and channels.
        measured_transfer_s: seconds from sending an edge device its message until its reply was there, without wall_s:
            both transfers, Flower's polling and the start of a process; like the next one, None in a simulation.
        measured_latency_s: seconds of inference of one image on the edge device, after training.
        test_loss, test_accuracy: cross entropy and accuracy of the round's new global model on the images that the
            client holds out (``partition.test-share``), in rounds whose model the server tests
            (``server.evaluate-every``), for the clients whose update came; None for others, like the next two.
        personal_test_loss, personal_test_accuracy: the same of the client's own model, the global one with what the
            strategy leaves on the client: its normalisation layers with fedbn. None where it leaves nothing.
    """

    round: int
    client: int
    node: int | None = None
    device: str
    status: str
    reason: str = ""
    examples: int
    steps: int
    kernels: int
    train_flops: int
    cum_train_flops: int
    compute_s: float
    down_s: float
    up_s: float
    total_s: float
    wall_s: float | None = None
    up_bytes: int
    down_bytes: int
    energy_j: float
    loss: float | None = None
    accuracy: float | None = None
    latency_s: float | None = None
    ies: float | None = None
    rcs: float | None = None
    kernel_entropy: float | None = None
    input_attention: float | None = None
    output_attention: float | None = None
    measured_transfer_s: float | None = None
    measured_latency_s: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    personal_test_loss: float | None = None
    personal_test_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch of centralised training. All seconds are measured on this machine; accuracy in [0, 1].

    Attributes:
        epoch: its number; also its `round`, so that what counts rounds counts epochs too.
        wall_s: seconds of training, evaluation not included; `cum_wall_s` since the start.
        lr, temperature: of SGD and of the kernel attention in this epoch.
        train_loss, train_accuracy: means over the augmented images as met while training.
        loss, accuracy, top5_accuracy: on the test set; the latter None with five classes or fewer.
        best_accuracy, validation_loss, validation_accuracy: as in `RoundRow`, an epoch counting as a round.
        kernel_entropy: mean over dynamic layers and samples of H(π)/ln K.
        train_flops: of this epoch; `cum_train_flops` since the start.
        latency_s: of inference of one image, measured when the run was started or resumed.
        ies_train, rcs_train: wall_s / accuracy, accuracy / wall_s.
        ies_infer, rcs_infer: latency_s / accuracy, accuracy / latency_s.
    """

    epoch: int
    wall_s: float
    cum_wall_s: float
    lr: float
    temperature: float | None = None
    train_loss: float
    train_accuracy: float
    loss: float
    accuracy: float
    top5_accuracy: float | None = None
    best_accuracy: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    kernel_entropy: float | None = None
    train_flops: int
    cum_train_flops: int
    latency_s: float
    ies_train: float
    rcs_train: float
    ies_infer: float
    rcs_infer: float

    @property
    def round(self) -> int:
        """The epoch's number."""
        return self.epoch


WALL_COLUMNS = ("wall_s", "measured_transfer_s", "measured_latency_s")
"""Seconds on real machines: only in these do the rounds and clients of two equal runs differ."""

Row = TypeVar("Row", RoundRow, ClientRow, EpochRow)
ROUND_COLUMNS = tuple(field.name for field in fields(RoundRow))
CLIENT_COLUMNS = tuple(field.name for field in fields(ClientRow))
EPOCH_COLUMNS = tuple(field.name for field in fields(EpochRow))
RUN_COLUMN = "run"
"""The first column of a table of several runs."""
_ROUND_LINE = "fedfmd-round "


def known(value: float) -> float | None:
    """NaN, which stands for what does not exist, as None."""
    return None if math.isnan(value) else value


def rounded(value: float) -> float:
    """Return a number as it is read back: with ten digits."""
    return float(f"{value:.10g}")


def csv_text(rows: Iterable[Iterable[float | str | None]]) -> str:
    """Rows of cells as CSV, one line each: None is empty, floats have ten digits or are `nan`, `inf`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.10g}"
    return cell_text(str(value))


def cell_text(text: str) -> str:
    """Return a text in one line: one row, one line, so that a file can be cut at any line."""
    return " ".join(text.split())


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that were written to their end, line breaks included.

    Raises:
        ValueError: a line is no text; the message names file and line.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(line.decode() + "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: no text ({error.reason})") from None
    return lines


def read_rounds(path: Path) -> list[RoundRow]:
    """Read the rows of a rounds.csv; a last line that was never finished is left out.

    Raises:
        ValueError: a cell is no value of its column; the text names file, line and column.
    """
    return _read(path, RoundRow)


def read_clients(path: Path) -> list[ClientRow]:
    """Read the rows of a clients.csv, as `read_rounds` does; a round that rounds.csv lacks was never finished."""
    return _read(path, ClientRow)


def read_epochs(path: Path) -> list[EpochRow]:
    """Read the rows of an epochs.csv, as `read_rounds` does."""
    return _read(path, EpochRow)


def read_table(path: Path, row_type: type[Row], names: Iterable[str]) -> dict[str, list[Row]]:
    """Read the rows of a table of several runs, by the run's name in the column `run`; `names` are all there may be.

    Raises:
        ValueError: as in `read_rounds`, or a row is of another run.
    """
    table: dict[str, list[Row]] = {name: [] for name in names}
    for number, record, row in _records(path, row_type):
        name = record.get(RUN_COLUMN)
        if name not in table:
            raise ValueError(f"{path}, line {number}, column {RUN_COLUMN}: {name!r} is none of the runs")
        table[name].append(row)
    return table


def _read(path: Path, row_type: type[Row]) -> list[Row]:
    return [row for _, _, row in _records(path, row_type)]


def _records(path: Path, row_type: type[Row]) -> Iterator[tuple[int, dict[str, str], Row]]:
    """Each line's number, its cells by column, and the row that they make."""
    adapter = TypeAdapter(row_type)
    reader = csv.DictReader(whole_lines(path))
    required = [f.name for f in fields(row_type) if f.default is MISSING]
    if reader.fieldnames and (missing := [name for name in required if name not in reader.fieldnames]):
        raise ValueError(
            f"{path}, line 1: no column {missing[0]}, among {', '.join(reader.fieldnames)}; it must be UTF-8 without a "
            "byte order mark, with commas between columns"
        )
    try:
        for record in reader:
            if None in record:
                raise ValueError(f"{path}, line {reader.line_num}: more values than columns")
            row = adapter.validate_python({name: cell for name, cell in record.items() if cell})
            yield reader.line_num, record, row
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{path}, line {reader.line_num}, column {first['loc'][0]}: {first['msg']}"
        ) from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from None


def round_line(row: RoundRow) -> str:
    """Return a round as a line for the log, `fedfmd-round {"round":1,…}`, so that remote runs can be recovered."""
    return _ROUND_LINE + TypeAdapter(RoundRow).dump_json(row).decode()


def parse_round_line(line: str) -> RoundRow | None:
    """Return the round in a line of a log, whatever stands before and after it; None if there is none."""
    _, found, text = line.partition(_ROUND_LINE)
    if not found:
        return None
    values, _ = json.JSONDecoder().raw_decode(text)
    return TypeAdapter(RoundRow).validate_python(values)
