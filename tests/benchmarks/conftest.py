import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"
SCRIPTS = [path.stem for path in FOLDER.rglob("*.py")]


@pytest.fixture(scope="module")
def script():
    """Imports a script of experiments/benchmarks by its name; none stays imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)
