import subprocess
import sys

import pytest

PROGRAM = """
import sys, psutil, torch
from fedfmd.memory import keep_freed, trim

def megabytes():
    return psutil.Process().memory_info().rss / 1e6

if "kept" in sys.argv:
    keep_freed()
before = megabytes()
tensors = [torch.ones(12_000_000) for _ in range(4)]
full = megabytes()
del tensors
if "trimmed" in sys.argv:
    trim()
print(full - before, megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
@pytest.mark.parametrize(
    ("how", "stays"),
    [([], False), (["kept"], True), (["kept", "trimmed"], False)],
    ids=["default", "kept", "trimmed"],
)
def test_what_is_freed_stays_or_goes(how, stays):
    command = [sys.executable, "-c", PROGRAM, *how]
    full, left = map(float, subprocess.check_output(command, text=True).split())
    assert full > 180  # four tensors of 48 MB
    assert left > 180 if stays else left < 20
