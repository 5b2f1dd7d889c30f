import math
from dataclasses import astuple, replace

import pytest

from fedfmd.runs import (
    CLIENT_COLUMNS,
    EPOCH_COLUMNS,
    ROUND_COLUMNS,
    RUN_COLUMN,
    WALL_COLUMNS,
    ClientRow,
    EpochRow,
    RoundRow,
    RunFolder,
    csv_text,
    parse_round_line,
    read_clients,
    read_epochs,
    read_rounds,
    read_table,
    round_line,
)

ROUND = RoundRow(
    round=3,
    virtual_s=36.25,
    round_s=12.5,
    wall_s=0.75,
    loss=0.5,
    accuracy=0.8,
    best_accuracy=0.85,
    validation_loss=0.6,
    validation_accuracy=0.75,
    temperature=30.0,
    clients_ok=8,
    clients_late=1,
    clients_failed=1,
    train_flops=10**12,
    cum_train_flops=3 * 10**12,
    up_bytes=2**53 + 1,  # a float would lose the last digit
    down_bytes=2**40,
    energy_j=90.0,
    latency_s=0.01,
    ies_train=15.625,
    rcs_train=0.064,
    ies_infer=0.0125,
    rcs_infer=80.0,
    clients_cut=4,
    epsilon=2.5,
)
CLIENT = ClientRow(
    round=3,
    client=7,
    node=0,
    device="pi-4",
    status="ok",
    examples=45,
    steps=5,
    kernels=4,
    train_flops=10**11,
    cum_train_flops=3 * 10**11,
    compute_s=9.0,
    down_s=0.5,
    up_s=1.0,
    total_s=10.5,
    wall_s=0.25,
    up_bytes=2_000_000,
    down_bytes=1_000_000,
    energy_j=75.6,
    loss=0.4,
    accuracy=0.9,
    latency_s=0.02,
    ies=0.0222,
    rcs=45.0,
    kernel_entropy=0.75,
    input_attention=0.5,
    output_attention=0.25,
    measured_transfer_s=3.5,
    measured_latency_s=0.03,
)
ATTENTIONS = ("kernel_entropy", "input_attention", "output_attention")
UNFIT = replace(
    CLIENT,
    client=8,
    node=None,
    status="unfit",
    reason='can\'t hold "2 GB",\n  naïvely',
    **dict.fromkeys([*WALL_COLUMNS, "loss", "accuracy", "latency_s", "ies", "rcs", *ATTENTIONS]),
)


EPOCH = EpochRow(
    epoch=3,
    wall_s=12.5,
    cum_wall_s=37.5,
    lr=0.1,
    train_loss=0.75,
    train_accuracy=0.7,
    loss=0.5,
    accuracy=0.8,
    top5_accuracy=0.99,
    best_accuracy=0.85,
    train_flops=10**12,
    cum_train_flops=3 * 10**12,
    latency_s=0.01,
    ies_train=15.625,
    rcs_train=0.064,
    ies_infer=0.0125,
    rcs_infer=80.0,
)


def write(path, round=ROUND, clients=(CLIENT,)) -> RunFolder:
    folder = RunFolder(path)
    folder.append_round(round, clients)
    return folder


def test_the_columns_are_those_that_users_rely_on():
    assert ",".join(ROUND_COLUMNS) == (
        "round,virtual_s,round_s,wall_s,loss,accuracy,best_accuracy,validation_loss,validation_accuracy,temperature,"
        "kernel_entropy,clients_ok,clients_late,clients_failed,train_flops,cum_train_flops,up_bytes,down_bytes,energy_j,latency_s,ies_train,"
        "rcs_train,ies_infer,rcs_infer,status,clients_cut,epsilon"
    )
    assert ",".join(CLIENT_COLUMNS) == (
        "round,client,node,device,status,reason,examples,steps,kernels,train_flops,cum_train_flops,compute_s,"
        "down_s,up_s,total_s,wall_s,up_bytes,down_bytes,energy_j,loss,accuracy,latency_s,ies,rcs,"
        "kernel_entropy,input_attention,output_attention,measured_transfer_s,measured_latency_s,"
        "test_loss,test_accuracy,personal_test_loss,personal_test_accuracy"
    )
    assert set(WALL_COLUMNS) < {*CLIENT_COLUMNS}
    assert ",".join(EPOCH_COLUMNS) == (
        "epoch,wall_s,cum_wall_s,lr,temperature,train_loss,train_accuracy,loss,accuracy,top5_accuracy,best_accuracy,"
        "validation_loss,validation_accuracy,kernel_entropy,train_flops,cum_train_flops,latency_s,ies_train,rcs_train,ies_infer,rcs_infer"
    )


def test_the_files_read_as_their_columns(tmp_path):
    folder = write(tmp_path, clients=[CLIENT, UNFIT])
    header, row = folder.rounds.read_text().splitlines()
    assert header == ",".join(ROUND_COLUMNS)
    assert row == (
        "3,36.25,12.5,0.75,0.5,0.8,0.85,0.6,0.75,30,,8,1,1,1000000000000,3000000000000,9007199254740993,1099511627776,"
        "90,0.01,15.625,0.064,0.0125,80,ok,4,2.5"
    )
    assert folder.clients.read_text().splitlines()[2] == (
        '3,8,,pi-4,unfit,"can\'t hold ""2 GB"", naïvely",45,5,4,100000000000,300000000000,9,0.5,1,10.5,,'
        "2000000,1000000,75.6,,,,,,,,,,,,,,"
    )


def test_rows_are_read_as_they_were_written(tmp_path):
    unfit = replace(UNFIT, reason='can\'t hold "2 GB", naïvely')  # a reason is one line
    folder = write(tmp_path, clients=[CLIENT, UNFIT])
    assert read_rounds(folder.rounds) == [ROUND]
    assert read_clients(folder.clients) == [CLIENT, unfit]
    folder.append_epoch(EPOCH)
    assert read_epochs(folder.epochs) == [EPOCH]


def test_files_from_before_validation_are_read_without_it(tmp_path):
    folder = write(tmp_path)
    header, row = folder.rounds.read_text().splitlines()
    header = header.replace("validation_loss,validation_accuracy,", "")
    folder.rounds.write_text(f"{header}\n{row.replace('0.6,0.75,', '')}\n")
    assert read_rounds(folder.rounds) == [replace(ROUND, validation_loss=None, validation_accuracy=None)]


def test_floats_keep_ten_digits(tmp_path):
    folder = write(tmp_path, replace(ROUND, virtual_s=0.1 + 0.2, loss=1e-7 / 3, energy_j=123456.789))
    assert folder.rounds.read_text().splitlines()[1].startswith("3,0.3,12.5,0.75,3.333333333e-08,")
    assert read_rounds(folder.rounds)[0].energy_j == 123456.789


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_survive_file_and_log(tmp_path, value):
    row = replace(ROUND, ies_train=value)
    folder = write(tmp_path, row)
    assert f",{value}," in folder.rounds.read_text()
    assert str(read_rounds(folder.rounds)[0].ies_train) == str(value)
    assert str(parse_round_line(round_line(row)).ies_train) == str(value)


def test_a_foreign_cell_is_an_error_that_names_its_place(tmp_path):
    folder = write(tmp_path)
    folder.rounds.write_text(folder.rounds.read_text().replace("0.85", "good"))
    with pytest.raises(ValueError, match=r"rounds\.csv, line 2, column best_accuracy: .* valid number"):
        read_rounds(folder.rounds)


@pytest.mark.parametrize(("line", "message"), [(b"\xff\n", "no text"), (b"a\rb\n", "new-line character")])
def test_a_line_that_is_no_text_or_no_csv_is_an_error_that_names_it(line, message, tmp_path):
    folder = write(tmp_path)
    folder.rounds.write_bytes(folder.rounds.read_bytes() + line)
    with pytest.raises(ValueError, match=rf"rounds\.csv, line 3: {message}"):
        read_rounds(folder.rounds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "\ufeff" + text, r"rounds\.csv, line 1: no column round, .*without a byte order mark"),
        (lambda text: text.replace(",", ";"), r"rounds\.csv, line 1: no column round, .*with commas"),
        (lambda text: text.rstrip("\n") + ",1\n", r"rounds\.csv, line 2: more values than columns"),
    ],
    ids=["byte order mark", "semicolons", "a value too many"],
)
def test_a_table_that_another_program_has_saved_is_refused_in_one_line(change, message, tmp_path):
    RunFolder(tmp_path).append_round(ROUND, [])
    path = tmp_path / "rounds.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read_rounds(path)


def test_a_table_of_several_runs_is_read_by_their_names(tmp_path):
    path = tmp_path / "rounds.csv"
    later = replace(ROUND, round=4)
    cells = [("a", *astuple(ROUND)), ("b", *astuple(ROUND)), ("a", *astuple(later))]
    path.write_text(csv_text([(RUN_COLUMN, *ROUND_COLUMNS), *cells]))
    assert read_table(path, RoundRow, ["a", "b", "c"]) == {"a": [ROUND, later], "b": [ROUND], "c": []}
    with pytest.raises(ValueError, match=r"rounds\.csv, line 3, column run: 'b' is none of the runs"):
        read_table(path, RoundRow, ["a"])


@pytest.mark.parametrize("around", ["{}", "\x1b[92mINFO \x1b[0m:      {}", "{}\x1b[0m and more"])
def test_a_round_is_recovered_from_a_log(around):
    assert round_line(ROUND).startswith('fedfmd-round {"round":3,"virtual_s":36.25,')
    assert parse_round_line(around.format(round_line(ROUND))) == ROUND


def test_other_lines_of_a_log_hold_no_round():
    assert parse_round_line("INFO :      Starting fedfmd") is None
