"""The benchmark of many clients: what it writes and reads, and a small real run."""

import csv
import sys

import pytest

from fedfmd.edge import load_trace


@pytest.fixture(scope="module")
def clients(script):
    return script("clients")


def test_its_clients_come_and_go_each_day(clients, tmp_path):
    clients.write_inputs(tmp_path, 60, 2)
    trace = load_trace(tmp_path / "trace.csv", 60)
    assert trace.period_s == 86_400
    for hour in range(24):
        there = sum(trace.has(client, 3600.0 * hour) for client in range(60))
        assert 10 <= there <= 45


def test_set_up_ends_with_the_last_line_before_the_first_round(clients, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "2026-01-02 03:04:05,250 INFO fedfmd: network\n"
        "2026-01-02 03:04:06,000 INFO 2 rounds of fedavg\n"
        "2026-01-02 03:04:08,000 INFO round 1/2  virtual\n"
        "2026-01-02 03:04:09,500 INFO round 2/2  virtual\n"
        "2026-01-02 03:04:09,750 INFO results: here\n"
    )
    first, ends, last = clients.moments(log)
    assert [end - first for end in ends] == [2, 3.5]
    assert last - first == 3.75


def test_rounds_in_which_nobody_looked_have_the_memory_seen_before(clients):
    assert clients.filled({0: 5, 2: 7, 3: 6}) == {0: 5, 1: 5, 2: 7, 3: 6}


@pytest.mark.slow
def test_a_small_run_is_measured(clients, tmp_path, monkeypatch):
    out = tmp_path / "clients.csv"
    command = "clients.py --clients 30 --per-round 4 --rounds 3 --workers 1 --csv-rows 0"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--out", str(out)])
    clients.main()
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["clients"], row["clients_form"]) == ("30", "parquet")
    assert float(row["setup_s"]) > 0
    assert 0 < float(row["round_s"]) < 60
    assert float(row["peak_mb"]) >= float(row["last_round_mb"]) > 100
