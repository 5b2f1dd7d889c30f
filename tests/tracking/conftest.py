import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedfmd.runs import RunFolder
from fedfmd.settings import Settings
from fedfmd.tracking import tracked


@pytest.fixture
def open_run(make_run, tmp_path):
    """Opens a run of six rounds of two clients; gives the context, and what does the rounds from `first` to `last`."""
    done = make_run([n / 10 for n in range(1, 7)], clients=(0.5, 0.7))

    def opened(loggers, **changes):
        folder = RunFolder(tmp_path / "run-a")
        settings = Settings.from_mapping({"tracking.loggers": loggers, "server.rounds": 6} | changes)

        def do(first, last):
            folder.truncate_after(first - 1)
            for row in done.rounds[first - 1 : last]:
                folder.append_round(row, [replace(client, round=row.round) for client in done.clients])
            return folder

        return tracked(settings, folder), do

    return opened


@pytest.fixture
def do_rounds(open_run):
    """Does rounds of that run, to its end or, if `killed`, without one, or to an error; gives its folder."""
    left_open = []

    def do_them(loggers, first, last, killed=False, error=None, **changes):
        context, do = open_run(loggers, **changes)
        if killed:
            left_open.append(context)  # or Python would close it
            context.__enter__()
            return do(first, last)
        with context:
            folder = do(first, last)
            if error:
                raise error
            return folder

    return do_them


@pytest.fixture
def forget():
    """Makes a run folder forget that a round was told, as a crash in between would."""

    def to_round(folder, name, number):
        path = folder.path / "tracking.json"
        path.write_text(path.read_text().replace(f'"{name}": {number + 1}', f'"{name}": {number}'))

    return to_round


class Listener:
    """Notes what it hears; raises where its class is told to."""

    heard: list
    deaf: tuple

    def run_started(self, run):
        self._hear("started", run)

    def round_ended(self, row, clients):
        self._hear(row.round, row, clients)

    def run_ended(self, end):
        self._hear("ended", end)

    def _hear(self, what, *details):
        if what in self.deaf:
            raise ConnectionError("the network\nis gone")
        self.heard.append((what, *details))


@pytest.fixture
def make_listener(monkeypatch):
    """Makes a class that ``own:NAME`` names, whose `heard` lists what its objects have heard."""
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "own", module)

    def make(name="Listener", deaf=()):
        setattr(module, name, type(name, (Listener,), {"heard": [], "deaf": deaf}))
        return getattr(module, name)

    return make
