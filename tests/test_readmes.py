"""What the READMEs and the help tell readers to type can be typed: Python runs, commands and settings are known."""

import importlib
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from flwr.common.config import parse_config_args
from PIL import Image

from fedfmd.cli import cli
from fedfmd.client.node_config import NodeConfig
from fedfmd.experiment import export_checkpoint, load_experiment, load_settings
from fedfmd.settings import Settings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedfmd"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").rglob("README.md")),
]
COMMANDS = typer.main.get_command(cli)
PLACEHOLDER = re.compile(r"…|[A-Z]{4}")  # FILE.yaml, NAME, data.train=…


def blocks(page, language):
    """The fenced blocks of a language, without those that the site takes from a file (`--8<--`)."""
    return re.findall(rf"^```{language}\n(?!--8<--)(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def typed(program):
    """The arguments of each call of a program, from all pages' blocks and spans of code and from the help."""
    lines = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
        lines += re.split(r"\n|&&|; ", shell)
        lines += re.findall(rf"`({program} [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    lines += [str(command.epilog).removeprefix("Example: ") for command in COMMANDS.commands.values()]
    calls = (shlex.split(line.strip().removeprefix("do "), comments=True) for line in lines)
    return {" ".join(call[1:]): call[1:] for call in calls if call and call[0] == program}


def cases(program, min_words=1):
    return [pytest.param(words, id=text) for text, words in typed(program).items() if len(words) >= min_words]


def shown(language):
    """The fenced blocks of a language on all pages."""
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, language))
    ]


def options(words, name):
    """The values of an option that may be repeated."""
    return [value for option, value in pairwise(words) if option == name]


def test_pages_show_what_is_checked_here():
    assert len(typed("fedfmd")) > 20
    assert len(typed("flwr")) > 2
    assert len(typed("flower-supernode")) > 2
    assert len(typed("python")) > 2
    assert len(shown("python") + shown("yaml")) > 2


@pytest.mark.parametrize("words", cases("fedfmd", min_words=2))
def test_a_command_line_is_one_that_the_command_takes(words):
    name, *arguments = words
    COMMANDS.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("words", cases("fedfmd"))
def test_a_command_that_is_spoken_of_exists(words):
    assert words[0] in COMMANDS.commands or words[0].startswith("--")


@pytest.mark.parametrize("words", cases("fedfmd", min_words=2))
def test_experiment_files_are_there_and_take_the_overrides_shown(words):
    files = [word for word in words if word.endswith(".yaml") and word.startswith("experiments/")]
    overrides = [value.replace("$seed", "0") for value in options(words, "--set")]
    if words[0] == "run" and files and not PLACEHOLDER.search(files[0]):
        assert load_experiment(ROOT / files[0], overrides).runs
    elif overrides:
        load_settings(None, overrides)


@pytest.mark.parametrize("words", cases("flwr"))
def test_the_run_config_shown_is_made_of_settings(words):
    for config in [*options(words, "-c"), *options(words, "--run-config")]:
        Settings.from_mapping(parse_config_args([config]))


@pytest.mark.parametrize("words", cases("flower-supernode"))
def test_the_node_config_shown_is_one_that_nodes_read(words):
    for config in options(words, "--node-config"):
        NodeConfig.from_mapping(parse_config_args([config]))


def test_files_that_the_site_takes_in_are_there():
    files = [file for page in PAGES for file in re.findall(r'^--8<-- "(.+)"$', page.read_text("utf-8"), re.M)]
    assert files
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_that_a_page_names_are_there(page):
    for script in re.findall(r"experiments/\S+\.(?:py|sh)\b", page.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script


def test_the_table_of_commands_tells_options_that_they_have():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `fedfmd (\w+).*$", text, re.M)
    assert sorted(rows) == sorted(COMMANDS.commands)
    for row in re.findall(r"^\| `fedfmd .*$", text, re.M):
        command = COMMANDS.commands[row.split()[2].strip("`")]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", row)) <= known


@pytest.mark.parametrize("words", cases("python", min_words=2))
def test_a_scripts_options_are_known_to_it(words, monkeypatch):
    script = ROOT / words[0]
    siblings = {path.stem for path in script.parent.glob("*.py")} - sys.modules.keys()
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", words)
    try:
        module = importlib.import_module(script.stem)
        if hasattr(module, "parse_options"):
            module.parse_options()
    finally:
        for name in siblings:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("text", shown("python"))
def test_python_shown_runs(text, write_checkpoint, tmp_path, monkeypatch, capsys):
    """In a folder with the files that the snippets speak of; for one round, which shows as much as three."""
    monkeypatch.chdir(tmp_path)
    export_checkpoint(write_checkpoint(), "safetensors", Path("model.safetensors"), None)
    Image.new("RGB", (20, 30), "red").save("image.jpg")
    exec(compile(text.replace('"server.rounds": 3', '"server.rounds": 1'), "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("text", shown("yaml"))
def test_experiments_shown_can_be_read(text, tmp_path):
    (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
    assert load_experiment(tmp_path / "shown.yaml").runs


def anchors(page):
    """The places in a page that links may point to: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not PACKAGE.exists() and PACKAGE in target.resolve().parents:
            continue  # beside an installed wheel the sources aren't here
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
