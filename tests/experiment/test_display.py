import io
import logging

import pytest
from rich.console import Console

from fedfmd.experiment.display import RunDisplay
from fedfmd.tracking import RoundRow, round_line

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


def test_records_are_printed_as_they_are(terminal, logger):
    with RunDisplay(terminal, 3, "") as display, display.handling(logger):
        logger.info("accuracy [0.5] %s", "long " * 20)
        logger.debug("a detail")
    text = terminal.file.getvalue()
    assert "accuracy [0.5] " + "long " * 20 in text
    assert "a detail" not in text


def test_a_file_gets_the_lines_alone(logger):
    console = Console(file=io.StringIO())
    with RunDisplay(console, 3, "") as display, display.handling(logger):
        logger.info("round 2", extra={"round_row": ROW})
        display.line("the end")
    assert console.file.getvalue() == "round 2\nthe end\n"


def test_the_bar_counts_rounds_and_the_clients_of_the_round(terminal, logger):
    with RunDisplay(terminal, 3, "seed=1") as display, display.handling(logger):
        for client in (0, 1):
            logger.debug("client %d", client, extra={"client": client})
        assert _bar(display) == ("seed=1", 0, ", 2 clients trained")
        logger.info("round 2", extra={"round_row": ROW})
        assert _bar(display) == ("seed=1", 2, "")


def test_the_bar_may_count_epochs(terminal):
    with RunDisplay(terminal, 3, "seed=1", "epoch"):
        pass
    assert " epochs " in terminal.file.getvalue()


def test_the_log_of_another_process_moves_the_bar_too(terminal):
    with RunDisplay(terminal, 3, "") as display:
        display.line("round 2 of 3")
        display.line(f"INFO: {round_line(ROW)}")
        assert _bar(display) == ("training", 2, "")
    assert "round 2 of 3" in terminal.file.getvalue()
    assert "fedfmd-round" not in terminal.file.getvalue()


def test_the_logger_is_left_as_it_was(terminal, logger):
    logger.setLevel(logging.ERROR)
    display = RunDisplay(terminal, 1, "")
    with pytest.raises(KeyboardInterrupt), display, display.handling(logger):
        raise KeyboardInterrupt
    assert logger.handlers == []
    assert logger.level == logging.ERROR


def _bar(display):
    (task,) = display._progress.tasks
    return task.description, task.completed, task.fields["clients"]
