"""The ``fedfmd`` command."""

from __future__ import annotations

import glob
import io
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import click
import typer
from typer.core import TyperCommand

from fedfmd.errors import FedfmdError, SettingsError, need
from fedfmd.packaged import copy_templates, examples
from fedfmd.version import __version__


class _Command(TyperCommand):
    """A command with plain help: typer puts a backslash before brackets, for markup that is off here."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help(ctx, formatter)
        formatter.buffer = [text.replace(r"\[", "[") for text in formatter.buffer]


cli = typer.Typer(
    help="Federated learning of dynamic-convolution ResNets on simulated and real edge fleets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
command = partial(cli.command, cls=_Command)


def _complete_experiment(incomplete: str) -> list[str]:
    """Return the examples, YAML files and folders whose names go on from here."""
    start = Path(incomplete)
    folder, name = (start, "") if incomplete.endswith("/") else (start.parent, start.name)
    found = sorted(folder.glob(f"{glob.escape(name)}*")) if folder.is_dir() else []
    return [
        *(name for name in examples() if name.startswith(incomplete)),
        *(f"{path}/" for path in found if path.is_dir()),
        *(str(path) for path in found if path.suffix in (".yaml", ".yml")),
    ]


def _complete_setting(incomplete: str) -> list[str]:
    """Return the keys that go on from here, or after `key=` the values."""
    from fedfmd.experiment.reference import all_settings

    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{setting.key}=" for setting in all_settings() if setting.key.startswith(key)]
    choices = next((setting.choices for setting in all_settings() if setting.key == key), ())
    return [f"{key}={choice}" for choice in choices if choice.startswith(value)]


def _complete_value(key: str) -> Callable[[str], list[str]]:
    """Return what completes the values of a setting."""

    def complete(incomplete: str) -> list[str]:
        return [text.partition("=")[2] for text in _complete_setting(f"{key}={incomplete}")]

    return complete


ExperimentFile = Annotated[
    Path,
    typer.Argument(
        help=f"Experiment file (YAML), or the name of one that comes with fedfmd: {', '.join(examples())}.",
        autocompletion=_complete_experiment,
    ),
]

Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, of those that fedfmd settings lists; may be repeated.",
        autocompletion=_complete_setting,
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class EngineName(StrEnum):
    """Ways to run on this machine."""

    inline = "inline"
    flwr = "flwr"


class ExportFormat(StrEnum):
    """What a model can be exported to."""

    onnx = "onnx"
    torch_export = "torch-export"
    safetensors = "safetensors"


class Backend(StrEnum):
    """What an edge device computes on."""

    cpu = "cpu"
    cuda = "cuda"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedfmd {__version__}")
        raise typer.Exit


@cli.callback()
def _fedfmd(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Federated learning of dynamic-convolution ResNets on simulated and real edge fleets."""


@command(epilog="Example: fedfmd run quickstart --set model.conv=static --set seed=1")
def run(
    file: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; by default one below runs/, named after file and settings."),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="inline: in this process. flwr: Flower's simulation on Ray.")
    ] = EngineName.inline,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Nodes that train at once, or runs of a matrix; 0: one per core. A single centralised run has "
            "neither: its cores are --set threads=N.",
        ),
    ] = 0,
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Ray cluster that --engine flwr joins, by its head, or auto for the one that this machine is in; by "
            "default that of RAY_ADDRESS, or else none.",
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the runs and what they will cost; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list of --dry-run as JSON.")] = False,
) -> None:
    """Run an experiment; run it again to go on where it was stopped."""
    from rich.console import Console

    from fedfmd.experiment import available_cores, load_experiment, run_experiment

    if as_json and not dry_run:
        raise SettingsError("--json prints the list of --dry-run: add --dry-run, or leave --json out")
    experiment = load_experiment(file, overrides)
    if dry_run:
        from fedfmd.experiment.estimate import estimate_experiment, estimate_table
        from fedfmd.report.tables import show

        estimate = estimate_experiment(experiment, out, engine.value, workers or available_cores())
        show(estimate.as_json(), estimate_table(estimate, experiment.name), as_json, Console())
        return
    try:
        run_experiment(experiment, out, engine.value, workers, Console(), address)
    except KeyboardInterrupt:
        _fail("stopped; finished rounds are kept, run the same command again to go on", 130)


@command(epilog="Example: fedfmd init mine")
def init(
    folder: Annotated[
        Path, typer.Argument(file_okay=False, help="Folder to write into, made if it isn't there.")
    ],
) -> None:
    """Write an experiment of your own to start from.

    It comes with comments, and with an algorithm of your own beside it. No file is overwritten.
    """
    for path in copy_templates(folder):
        typer.echo(path)
    typer.echo(f"now: fedfmd run {folder / 'experiment.yaml'}", err=True)


@command(epilog="Example: fedfmd settings temperature")
def settings(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Only settings whose name, meaning or values hold these; by default all.", metavar="WORDS"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the settings: meaning, allowed values, default."""
    from rich.console import Console

    from fedfmd.experiment.reference import find_settings, settings_table
    from fedfmd.report.tables import show

    found = find_settings(" ".join(words or ()))
    show([asdict(setting) for setting in found], settings_table(found), as_json, Console())


@command(epilog="Example: fedfmd report runs --target 90 --out report")
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, packed runs, or folders that hold some.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Where to write; by default the folder of --pack, or the first one."
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=100,
            help="Test accuracy in percent whose cost is told; by default the lowest final mean.",
        ),
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder to pack the runs into: rounds.csv or epochs.csv with all rows, clients.csv, runs.json.",
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Setting, such as train.lr, of which each variant gets its best value by validation accuracy; may be "
            "repeated; by default those that the experiment file said.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs over seeds, in tables, plots and a page.

    Writes report.html with all plots, report_files with a page for each run, the tables as report.md and report.csv,
    and curves.png.
    """
    from rich.console import Console, Group

    from fedfmd.report import LIBRARIES
    from fedfmd.report.selection import Selection

    need("a report", *LIBRARIES)
    from fedfmd.report.sheets import flat_row, make_sheets, terminal_tables
    from fedfmd.report.tables import show
    from fedfmd.report.writing import write_report

    selection = Selection.over_keys(select) if select else None
    summary, notes = write_report(folders, out or pack or folders[0], target, pack, selection)
    rows = [flat_row(group, summary.target) for group in summary.groups]
    for note in notes:
        typer.echo(note, err=True)
    console = Console()
    tables = [table for sheet in make_sheets(summary) for table in terminal_tables(sheet, console)]
    show(rows, Group(*tables), as_json, console)


@command(epilog="Example: fedfmd cost --model resnet18 --image-size 224 --classes 1000 --stem imagenet")
def cost(
    model: Annotated[
        str, typer.Option(help="Architecture, as model.arch.", autocompletion=_complete_value("model.arch"))
    ] = "resnet18",
    image_size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 32,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    kernels: Annotated[int, typer.Option(min=1, help="Kernels per bank.")] = 4,
    stem: Annotated[str, typer.Option(help="cifar or imagenet.")] = "cifar",
    norm: Annotated[str, typer.Option(help="group, as in a run, or batch.")] = "group",
    width: Annotated[float, typer.Option(help="Factor on every channel count.")] = 1.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time inference of one image on this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare what a network costs with each convolution.

    Counts parameters, MACs, FLOPs and bytes, for one image.
    """
    from rich.console import Console

    from fedfmd.report.tables import cost_rows, cost_table, show
    from fedfmd.settings import Settings

    chosen = {"arch": model, "kernels": kernels, "stem": stem, "norm": norm, "width": width}
    rows = cost_rows(Settings.from_mapping({"model": chosen}), classes, image_size, measure)
    title = (
        f"{model} (width {width:g}, K={kernels}), {classes} classes, one image of {image_size}×{image_size}"
    )
    show(rows, cost_table(rows, title), as_json, Console())


@command(epilog="Example: fedfmd partition --set partition.alpha=0.1 --set partition.clients=20 --out split")
def partition(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for partition.npz and partition.png.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Experiment file (YAML), or the name of an example; by default the defaults.",
            autocompletion=_complete_experiment,
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    as_json: AsJson = False,
) -> None:
    """Split a data set over the clients.

    Gives a table, a picture and the images of each client.
    """
    from rich.console import Console

    from fedfmd.build import build_dataset, build_partition
    from fedfmd.data import save_partition
    from fedfmd.experiment import load_settings
    from fedfmd.report.tables import partition_rows, partition_table, show

    settings = load_settings(file, overrides)
    dataset = build_dataset(settings)
    split = build_partition(settings, dataset)
    save_partition(split, dataset.train.labels, dataset.classes, out, dataset.class_names)
    rows = partition_rows(split, dataset)
    show(rows, partition_table(rows, f"{dataset.name}: {split.title}"), as_json, Console())


@command(
    epilog="Example: fedfmd calibrate --model resnet8 --conv fmdconv --batch-size 16 --name pi-attic --out box.yaml"
)
def calibrate(
    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="ARCH",
            help="Network, as model.arch; may be repeated.",
            autocompletion=_complete_value("model.arch"),
        ),
    ] = ["resnet8"],  # noqa: B006 - typer copies it
    convs: Annotated[
        list[str] | None,
        typer.Option(
            "--conv",
            metavar="CONV",
            help="Convolution, as model.conv; may be repeated; by default all.",
            autocompletion=_complete_value("model.conv"),
        ),
    ] = None,
    batch_sizes: Annotated[
        list[int], typer.Option("--batch-size", min=1, help="Images per step, beside 1; may be repeated.")
    ] = [16],  # noqa: B006 - typer copies it
    name: Annotated[str, typer.Option(help="What fleets call this device.")] = "box",
    out: Annotated[
        Path,
        typer.Option(dir_okay=False, help="YAML file; its row of this name is replaced, others are kept."),
    ] = Path("box.yaml"),
    image_size: Annotated[int, typer.Option(min=8, help="Height and width in pixels.")] = 32,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    kernels: Annotated[
        list[int], typer.Option(min=1, help="Kernels per bank, as model.kernels; may be repeated.")
    ] = [4],  # noqa: B006 - typer copies it
    norm: Annotated[str, typer.Option(help="batch or group.")] = "group",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each kind, whose median counts.")] = 5,
    backend: Annotated[Backend, typer.Option("--device-backend", help="What to compute on.")] = Backend.cpu,
    threads: Annotated[int, typer.Option(min=0, help="Threads of PyTorch; 0: its own choice.")] = 0,
    power_w: Annotated[
        float | None,
        typer.Option(min=0.01, help="Watts under load; by default those of the most similar device."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[:PORT]", help="Measure the link to an iperf3 server, `iperf3 --server`, there."
        ),
    ] = None,
    down_mbps: Annotated[
        float | None, typer.Option(min=0.001, help="The link's rate from the server, if it is not measured.")
    ] = None,
    up_mbps: Annotated[float | None, typer.Option(min=0.001, help="The link's rate to the server.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, as a device for fleets.

    Times training and inference, and writes a device profile for fleets and SuperNodes.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from fedfmd import calibration
    from fedfmd.build import torch_device
    from fedfmd.conv import CONVS
    from fedfmd.edge import link_mbps
    from fedfmd.report.tables import show, timing_table

    if threads:
        torch.set_num_threads(threads)
    common = {"model.norm": norm, "device": backend.value}
    networks = calibration.models_of(models, convs or CONVS, kernels, common)
    rows = calibration.other_rows(out, name)
    if server:
        down_mbps, up_mbps = link_mbps(server)
    measured = [
        calibration.measure(network, classes, image_size, batch_sizes, repeats)
        for network in track(networks, "measuring", console=Console(stderr=True), transient=True)
    ]
    device = calibration.make_device(
        name,
        measured,
        calibration.source_of(networks[0], kernels, image_size, batch_sizes),
        memory_gb=calibration.total_memory_gb(torch_device(networks[0])),
        power_w=power_w,
        down_mbps=down_mbps,
        up_mbps=up_mbps,
    )
    calibration.write_devices(out, rows | {name: device})
    timings = [timing for measurement in measured for timing in measurement.timings]
    show(
        [asdict(timing) for timing in timings],
        timing_table(timings, f"{name}, per image"),
        as_json,
        Console(),
    )
    typer.echo(f"{out}: {name}, {device.train_gflops:g} GFLOP/s in training", err=True)


@command(name="compile", epilog="Example: fedfmd compile")
def compile_mixing() -> None:
    """Compile the mixing of kernels for this processor.

    It takes a C compiler and a few seconds. Large dynamic networks then train about half again as fast on the CPU:
    model.mixing = auto uses the compiled code by itself. It lies in the cache folder, and can be deleted there.
    """
    from fedfmd.conv.native import compile_native

    typer.echo("\n".join(map(str, compile_native())))


@command(
    epilog="Example: fedfmd export runs/quickstart-0123abcd/checkpoints/round-00020.safetensors --format onnx"
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's checkpoints/round-….safetensors.")],
    target: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.onnx,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File to write; by default beside the checkpoint.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels; by default the run's.")
    ] = None,
) -> None:
    """Write a trained model for other runtimes.

    It takes batches of any size, of images normalised as in training; safetensors are for fedfmd.classifier, which
    normalises them itself.
    """
    from fedfmd.experiment import export_checkpoint

    _keep(checkpoint, out)
    typer.echo(export_checkpoint(checkpoint, target.value, out, image_size))


@command(epilog="Example: fedfmd cam runs/quickstart-0123abcd/checkpoints/round-00020.safetensors test:3")
def cam(
    checkpoint: Annotated[Path, typer.Argument(help="A run's checkpoints/round-….safetensors.")],
    images: Annotated[
        list[str], typer.Argument(help="Image files, or test:3 for image 3 of the run's test set.")
    ],
    out: Annotated[Path, typer.Option(dir_okay=False, help="Picture to write (PNG).")] = Path("cam.png"),
    layer: Annotated[
        str | None,
        typer.Option(
            help="Stage or residual block, such as layer2; by default the deepest with 7×7 or more."
        ),
    ] = None,
    class_index: Annotated[
        int | None, typer.Option("--class", help="Class to explain; by default each image's predicted one.")
    ] = None,
) -> None:
    """Draw where a trained model looks (Grad-CAM++).

    Each of its attentions is shown alone, and all together.
    """
    need("a picture", "matplotlib")
    from fedfmd.serving.cam import write_cam

    for source in (checkpoint, *map(Path, images)):
        _keep(source, out)
    typer.echo(write_cam(checkpoint, images, out, layer, class_index))


def main() -> None:
    """Entry point: a user's mistake ends in one line and exit status 2, a failed run in one line and 1."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sign that can't be shown, such as ×, must not end a run
    try:
        cli()
    except SettingsError as error:
        _fail(str(error), 2)
    except (FedfmdError, OSError) as error:
        _fail(str(error), 1)


def _keep(source: Path, out: Path | None) -> None:
    """See to it that a command does not overwrite what it reads.

    Raises:
        SettingsError: both are the same file.
    """
    if out is not None and out.exists() and source.exists() and out.samefile(source):
        raise SettingsError(f"--out = {out}: would overwrite {source}, which is read; name another file")


def _fail(message: str, status: int) -> NoReturn:
    print(f"fedfmd: {message}", file=sys.stderr)
    sys.exit(status)
