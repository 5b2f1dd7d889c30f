"""The ``fedfmd`` command."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedfmd.errors import FedfmdError, SettingsError

cli = typer.Typer(
    help="Federated learning of dynamic-convolution ResNets on simulated and real edge fleets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]


class EngineName(StrEnum):
    """Ways to run on this machine."""

    inline = "inline"
    flwr = "flwr"


@cli.callback()
def _quiet() -> None:
    """Federated learning of dynamic-convolution ResNets on simulated and real edge fleets."""


@cli.command(epilog="Example: fedfmd run experiments/quickstart.yaml --set model.conv=static --set seed=1")
def run(
    file: Annotated[Path, typer.Argument(help="Experiment file (YAML).")],
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; by default one below runs/, named after file and settings."),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="inline: in this process. flwr: Flower's simulation on Ray.")
    ] = EngineName.inline,
    workers: Annotated[int, typer.Option(min=0, help="Nodes that train at once; 0: one per core.")] = 0,
) -> None:
    """Run an experiment; run it again to go on where it was stopped."""
    from rich.console import Console

    from fedfmd.experiment import available_cores, load_experiment, run_experiment

    logging.getLogger("flwr").setLevel(logging.WARNING)  # only now: importing flwr sets its own
    experiment = load_experiment(file, overrides)
    try:
        run_experiment(experiment, out, engine.value, workers or available_cores(), Console())
    except KeyboardInterrupt:
        _fail("stopped; finished rounds are kept, run the same command again to go on", 130)


def main() -> None:
    """Entry point: a user's mistake ends in one line and exit status 2, a failed run in one line and 1."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        cli()
    except SettingsError as error:
        _fail(str(error), 2)
    except (FedfmdError, OSError) as error:
        _fail(str(error), 1)


def _fail(message: str, status: int) -> NoReturn:
    print(f"fedfmd: {message}", file=sys.stderr)
    sys.exit(status)
