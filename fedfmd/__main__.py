"""``python -m fedfmd``: the ``fedfmd`` command."""

from fedfmd.cli import main

main()
