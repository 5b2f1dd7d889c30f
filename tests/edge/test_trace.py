import pytest

from fedfmd.edge import Trace, load_trace

HEADER = "client,start_s,end_s\n"


@pytest.fixture
def load(tmp_path):
    def load(text, clients=3):
        path = tmp_path / "trace.csv"
        path.write_text(text)
        return load_trace(path, clients)

    return load


def test_a_file_holds_one_window_per_line(load):
    trace = load(HEADER + "0,10,20\n2,0,5.5\n0,0,4\n")
    assert trace == Trace({0: ((0, 4), (10, 20)), 2: ((0, 5.5),)}, period_s=20)


@pytest.mark.parametrize(
    ("time", "there"),
    [
        (0, True),
        (3.9, True),
        (4, False),
        (9.9, False),
        (10, True),
        (19.9, True),
        (20, True),
        (24, False),
        (50, True),
    ],
)
def test_a_client_is_there_in_its_windows_which_repeat(load, time, there):
    trace = load(HEADER + "0,0,4\n0,10,20\n")
    assert trace.has(0, time) == there
    assert trace.has(1, time)  # it has no windows: it is always there


@pytest.mark.parametrize(("time", "seconds"), [(6.0, 4), (26.0, 4), (15.0, 3), (5.0, 5)])
def test_the_next_window_opens_after_some_seconds(load, time, seconds):
    trace = load(HEADER + "0,10,12\n1,4,5\n2,18,20\n")
    assert trace.until_next(time) == seconds


def test_a_clock_advanced_to_a_window_is_in_it_whatever_the_rounding(load):
    trace = load(HEADER + "0,0.1,0.3\n")
    time = 0.3
    for _ in range(1000):
        time += trace.until_next(time)
        assert trace.has(0, time)
        time += 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the header `client,start_s,end_s` and a line per window"),
        (HEADER, "must have the header"),
        ("client,start,end\n0,1,2\n", "must have the header"),
        (HEADER + "0,1,2\n3,1,2\n", "line 3 is of client 3, partition.clients is 3: remove the line"),
        (HEADER + "0,5,5\n", "line 2 is '0,5,5': it must hold .* 0 <= start_s < end_s"),
        (HEADER + "0,-1,5\n", "line 2 is '0,-1,5'"),
        (HEADER + "-1,1,5\n", "line 2 is '-1,1,5'"),
        (HEADER + "a,1,5\n", "line 2 is 'a,1,5'"),
        (HEADER + "0,1\n", "line 2 is '0,1,None'"),
        (HEADER + "0,1,inf\n", "line 2 is '0,1,inf'"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_setting_file_and_line(load, text, message):
    with pytest.raises(ValueError, match=rf"^fleet\.trace = .*trace\.csv: {message}") as error:
        load(text)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^fleet\.trace = .*none\.csv: cannot be read"):
        load_trace(tmp_path / "none.csv", 3)
