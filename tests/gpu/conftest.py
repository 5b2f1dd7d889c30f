import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "gpu"
SCRIPTS = [path.stem for path in FOLDER.glob("*.py")]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of experiments/gpu by its name; none stays imported."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)
