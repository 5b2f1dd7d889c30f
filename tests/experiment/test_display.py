import io
import logging
from contextlib import closing

import pytest
from rich.console import Console

from fedfmd.experiment.display import ExperimentDisplay
from fedfmd.runs import RoundRow, round_line

ROW = RoundRow(
    round=2,
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


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=60)


@pytest.fixture
def logger():
    return logging.getLogger("test_display")


def bars(display):
    """Each visible bar's name, rounds done and all, and clients."""
    return [
        (task.description, task.completed, task.total, task.fields["clients"])
        for task in display.progress.tasks
        if task.visible
    ]


def test_records_are_printed_as_they_are(terminal, logger):
    with ExperimentDisplay(terminal, 1, 3) as display, display.run("", 3).handling(logger):
        logger.info("accuracy [0.5] %s", "long " * 20)
        logger.debug("a detail")
    text = terminal.file.getvalue()
    assert "accuracy [0.5] " + "long " * 20 in text
    assert "a detail" not in text


def test_a_sign_that_the_console_lacks_is_a_question_mark():
    ascii_file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with ExperimentDisplay(Console(file=ascii_file), 1, 3) as display:
        display.print("32×32")
    assert ascii_file.buffer.getvalue() == b"32?32\n"


def test_a_file_gets_the_lines_alone(logger):
    console = Console(file=io.StringIO())
    with ExperimentDisplay(console, 1, 3) as display:
        run = display.run("", 3)
        with run.handling(logger):
            logger.info("round 2", extra={"round_row": ROW})
        run.line("the end")
    assert console.file.getvalue() == "round 2\nthe end\n"


def test_lines_of_several_runs_begin_with_the_runs_name(logger):
    console = Console(file=io.StringIO())
    with ExperimentDisplay(console, 2, 6) as display:
        first, second = display.run("seed=0", 3), display.run("seed=1", 3)
        first.handle(logging.makeLogRecord({"msg": "round %d", "args": (1,), "levelno": logging.INFO}))
        second.line("a line\nand another")
        display.print("report")
    assert console.file.getvalue() == "seed=0 | round 1\nseed=1 | a line\nseed=1 | and another\nreport\n"


def test_the_bar_counts_rounds_and_the_clients_of_the_round(terminal, logger):
    with ExperimentDisplay(terminal, 1, 3) as display, display.run("", 3).handling(logger):
        for client in (0, 1):
            logger.debug("client %d", client, extra={"client": client})
        assert bars(display) == [("training", 0, 3, ", 2 clients trained")]
        logger.info("round 2", extra={"round_row": ROW})
        assert bars(display) == [("training", 2, 3, "")]


def test_the_bar_may_count_epochs(terminal):
    with ExperimentDisplay(terminal, 1, 3, unit="epoch") as display:
        display.run("", 3)
    assert " epochs " in terminal.file.getvalue()


def test_the_log_of_another_process_moves_the_bar_too(terminal):
    with ExperimentDisplay(terminal, 1, 3) as display:
        run = display.run("", 3)
        run.line("round 2 of 3")
        run.line(f"INFO: {round_line(ROW)}")
        assert bars(display) == [("training", 2, 3, "")]
    assert "round 2 of 3" in terminal.file.getvalue()
    assert "fedfmd-round" not in terminal.file.getvalue()


def test_several_runs_have_a_bar_each_while_they_run_and_one_for_all_rounds(terminal):
    with ExperimentDisplay(terminal, 2, 6, done=1) as display:
        with closing(display.run("seed=0", 3, done=1)) as run:
            assert bars(display) == [("0/2 runs", 1, 6, ""), ("seed=0", 1, 3, "")]
            run.line(round_line(ROW))
            assert bars(display) == [("0/2 runs", 2, 6, ""), ("seed=0", 2, 3, "")]
        assert bars(display) == [("1/2 runs", 2, 6, "")]
        run.close()  # as `logging` does with every handler at the end of the process
        assert bars(display) == [("1/2 runs", 2, 6, "")]


def test_the_logger_is_left_as_it_was(terminal, logger):
    logger.setLevel(logging.ERROR)
    display = ExperimentDisplay(terminal, 1, 1)
    with pytest.raises(KeyboardInterrupt), display, display.run("", 1).handling(logger):
        raise KeyboardInterrupt
    assert logger.handlers == []
    assert logger.level == logging.ERROR
