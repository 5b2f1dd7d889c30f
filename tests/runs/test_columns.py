from dataclasses import astuple, fields, replace

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from fedfmd.errors import SettingsError
from fedfmd.runs import ClientRow, RoundRow, RunFolder, clients_of, read_rounds
from fedfmd.runs.columns import parts, read_parts, write_part

ROUND = RoundRow(
    round=1,
    virtual_s=1.0,
    round_s=1.0,
    wall_s=1.0,
    clients_ok=2,
    clients_late=0,
    clients_failed=0,
    train_flops=1,
    cum_train_flops=1,
    up_bytes=1,
    down_bytes=1,
    energy_j=1.0,
)
CLIENT = ClientRow(
    round=1,
    client=0,
    device="pi-4",
    status="failed",
    reason="naïve,  “quoted”\nand broken",
    examples=1,
    steps=2,
    kernels=4,
    train_flops=10**15,
    cum_train_flops=10**17,
    compute_s=1 / 3,
    down_s=1e-12,
    up_s=12345678.912345,
    total_s=3.0,
    up_bytes=7,
    down_bytes=8,
    energy_j=1.0,
    accuracy=0.25,
    ies=float("inf"),
)


def rows(round):
    others = {"client": 1, "node": 3, "reason": "", "loss": 2 / 3, "test_accuracy": 1.0}
    return replace(ROUND, round=round), [replace(CLIENT, round=round), replace(CLIENT, round=round, **others)]


def finished(path, rounds, in_columns=True):
    folder = RunFolder(path, in_columns)
    for round in range(1, rounds + 1):
        folder.append_round(*rows(round))
    return folder


def content(folder):
    return folder.rounds.read_bytes(), {
        n: path.read_bytes() for n, path in parts(folder.client_parts).items()
    }


def test_rows_read_back_are_those_of_a_csv_file(tmp_path):
    columns, table = finished(tmp_path / "columns", 2), finished(tmp_path / "table", 2, in_columns=False)
    assert (columns.clients.exists(), table.client_parts.exists()) == (False, False)
    assert clients_of(columns.path) == clients_of(table.path)
    assert [type(value) for value in astuple(clients_of(columns.path)[1])] == [
        type(value) for value in astuple(clients_of(table.path)[1])
    ]


def test_the_folder_is_one_table_for_what_reads_parquet(tmp_path):
    folder = finished(tmp_path, 3)
    table = pandas.read_parquet(folder.client_parts)
    assert list(table.columns) == [field.name for field in fields(ClientRow)]
    assert table["round"].tolist() == [1, 1, 2, 2, 3, 3]
    assert table["compute_s"].iloc[0] == 0.3333333333


def test_a_resumed_run_has_the_files_of_one_that_never_stopped(tmp_path):
    folder = finished(tmp_path / "stopped", 7)
    folder.truncate_after(4)
    for round in (5, 6, 7, 8):
        folder.append_round(*rows(round))
    assert content(folder) == content(finished(tmp_path / "straight", 8))


def test_a_run_killed_between_any_two_steps_of_a_round_goes_on_from_the_round_before(tmp_path, monkeypatch):
    """A round's file is there as a whole or not at all, under the name of a part only when it is whole."""
    before, folder = content(finished(tmp_path / "before", 2)), finished(tmp_path / "killed", 2)
    for broken in ("write_bytes", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pathlib.Path.{broken}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                folder.append_round(*rows(3))
        (folder.client_parts / ".round-00003.parquet.partial").write_bytes(
            b"PAR1 half of it"
        )  # as a kill leaves it
        assert [row.round for row in clients_of(folder.path)] == [1, 1, 2, 2]
        assert len(pandas.read_parquet(folder.client_parts)) == 4
        folder.truncate_after(2)
        assert content(folder) == before
    write_part(folder.client_parts, 3, rows(3)[1])  # killed before its row is in rounds.csv
    assert [row.round for row in read_rounds(folder.rounds)] == [1, 2]
    folder.truncate_after(2)
    assert content(folder) == before


def test_a_run_whose_setting_changed_has_its_rows_in_both_places(tmp_path):
    finished(tmp_path, 2, in_columns=False)
    folder = RunFolder(tmp_path, in_columns=True)
    folder.append_round(*rows(3))
    assert [row.round for row in clients_of(tmp_path)] == [1, 1, 2, 2, 3, 3]
    folder.truncate_after(1)
    assert [row.round for row in clients_of(tmp_path)] == [1, 1]


def test_a_checkpoint_knows_the_files_of_its_rounds(tmp_path):
    folder = finished(tmp_path, 2)
    assert folder.records == [
        folder.rounds,
        *(folder.client_parts / f"round-0000{n}.parquet" for n in (1, 2)),
    ]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "round-00001.parquet: "),
        (lambda path: path.write_bytes(b""), "round-00001.parquet: "),
        (
            lambda path: rewrite(path, lambda table: table.drop_columns("status")),
            "column status: it is missing",
        ),
        (
            lambda path: rewrite(path, lambda table: with_column(table, "steps", [1, None])),
            "column steps: a value",
        ),
        (
            lambda path: rewrite(path, lambda table: with_column(table, "loss", ["a", "b"])),
            "round-00001.parquet: ",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, fault):
    folder = finished(tmp_path, 1)
    change(folder.client_parts / "round-00001.parquet")
    with pytest.raises(ValueError, match=fault):
        clients_of(tmp_path)


def rewrite(path, change):
    pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), path)


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, pyarrow.array(values))


def test_files_of_an_older_version_may_lack_columns_that_may_be_empty(tmp_path):
    folder = finished(tmp_path, 1)
    whole = clients_of(tmp_path)
    rewrite(
        folder.client_parts / "round-00001.parquet",
        lambda table: table.drop_columns(["node", "test_accuracy"]),
    )
    assert clients_of(tmp_path) == [replace(row, node=None, test_accuracy=None) for row in whole]


def test_a_round_without_clients_has_a_file_without_rows(tmp_path):
    folder = RunFolder(tmp_path, in_columns=True)
    folder.append_round(replace(ROUND, clients_ok=0), [])
    folder.append_round(*rows(2))
    assert [row.round for row in clients_of(tmp_path)] == [2, 2]


def test_without_the_library_the_error_tells_what_brings_it(tmp_path, monkeypatch):
    finished(tmp_path, 1)
    monkeypatch.setattr("fedfmd.errors.find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match=r"round-00001.parquet needs pyarrow: pip install 'fedfmd\[server\]'"
    ):
        clients_of(tmp_path)


def test_a_million_rows_share_their_texts(tmp_path):
    write_part(tmp_path, 1, [replace(CLIENT, client=client) for client in range(100)])
    texts = [text for row in read_parts(tmp_path) for text in (row.device, row.reason, row.status)]
    assert len({id(text) for text in texts}) == 3


def test_columns_take_a_fifth_of_a_csv_files_bytes(tmp_path):
    many = [
        replace(
            CLIENT, client=client, reason="", status="ok", device=f"pi-{client % 3}", loss=1 / (client + 1)
        )
        for client in range(2000)
    ]
    for in_columns in (True, False):
        RunFolder(tmp_path / str(in_columns), in_columns).append_round(ROUND, many)
    part = tmp_path / "True" / "clients.parquet" / "round-00001.parquet"
    assert part.stat().st_size < (tmp_path / "False" / "clients.csv").stat().st_size / 5
