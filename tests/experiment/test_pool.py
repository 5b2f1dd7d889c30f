"""Jobs are texts of Python code, done by `exec`. A process takes seconds to start, so few are."""

import logging
import subprocess
import sys
from contextlib import closing

import psutil
import pytest

from fedfmd.errors import RunError
from fedfmd.experiment.pool import Ended, Started, attempt, run_jobs

LOG = "import logging; logging.getLogger('fedfmd.x').info('%d images', 7, extra={'client': 1})"
NAME = "import logging, os; logging.getLogger('fedfmd').info(os.getpid())"
FAIL = "from fedfmd.errors import RunError; raise RunError('all\\nfailed')"
DIE = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
EXIT = "import os; os._exit(3)"
SLEEP = "import logging, time; logging.getLogger('fedfmd').info('asleep'); time.sleep(600)"


def children():
    return set(psutil.Process().children(recursive=True))


@pytest.mark.slow
def test_jobs_tell_what_happens_and_one_that_fails_stops_no_other():
    jobs = [LOG, FAIL, DIE, EXIT, NAME]
    with closing(run_jobs(exec, jobs, processes=1)) as events:
        told = list(events)
    kinds = [(jobs.index(job), type(event)) for job, event in told]
    assert kinds == [
        *[(0, Started), (0, logging.LogRecord), (0, Ended)],
        *[(job, kind) for job in (1, 2, 3) for kind in (Started, Ended)],
        *[(4, Started), (4, logging.LogRecord), (4, Ended)],
    ]
    record = told[1][1]
    assert (record.name, record.getMessage(), record.client) == ("fedfmd.x", "7 images", 1)
    assert [event.error for _, event in told if isinstance(event, Ended)] == [
        "",
        "all failed",
        "its process was killed, by the system perhaps for lack of memory: use fewer --workers",
        "its process ended with exit status 3",
        "",
    ]


@pytest.mark.slow
def test_jobs_run_at_the_same_time_in_processes_that_are_used_again_and_ended():
    before = children()
    pids = []
    jobs = [SLEEP, NAME, f"{NAME} # again"]
    with closing(run_jobs(exec, jobs, processes=2)) as events:
        for job, event in events:
            if job != SLEEP and isinstance(event, logging.LogRecord):
                pids.append(event.getMessage())
            if len(pids) == 2:
                break
    assert pids[0] == pids[1]
    assert not {process for process in children() - before if str(process.pid) in pids}


def test_the_traceback_of_an_error_that_nobody_foresaw_is_logged(caplog):
    assert attempt(exec, "1 / 0") == Ended("ZeroDivisionError: division by zero")
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("error", [RunError("a\nb"), OSError("a b")])
def test_an_error_that_a_user_can_mend_is_its_text_alone(error, caplog):
    def fail(job):
        raise error

    assert attempt(fail, None) == Ended("a b")
    assert caplog.text == ""


def test_a_worker_whose_parent_is_gone_says_nothing():
    """It may log before it notices."""
    code = (
        "import logging.handlers, multiprocessing\n"
        "from fedfmd.processes import Outlet\n"
        "ours, theirs = multiprocessing.Pipe()\n"
        "ours.close()\n"
        "handler = logging.handlers.QueueHandler(Outlet(theirs))\n"
        "handler.handle(logging.makeLogRecord({'msg': 'round 1'}))\n"
        "print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")
