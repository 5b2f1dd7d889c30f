import json
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

from fedfmd.report.comparison import read_comparison
from fedfmd.report.page import render_page, render_run
from fedfmd.report.sheets import make_sheets
from fedfmd.report.statistics import summarise

VOID = {"meta", "br", "img", "link", "input"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>$$x$$"


class Page(HTMLParser):
    """Collects what a page holds; every element must be closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.headings, self.captions, self.references = [], [], [], [], []
        self.tables, self.scripts, self.elements = {}, [], []
        self.cost = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self.cost, []).append([])
        if tag in ("th", "td"):
            self.tables[self.cost][-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name == "data-cost" and tag == "div":
                self.cost = value
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.cost = ""

    def handle_data(self, text):
        if not self.open:
            return
        if {"th", "td"} & set(self.open):
            self.tables[self.cost][-1][-1] += " ".join(text.split())
        if self.open[-1] == "script":
            self.scripts[-1] += text
        if self.open[-1] == "h2":
            self.headings.append(text.strip())
        if self.open[-2:] == ["figcaption", "b"]:
            self.captions.append(text.strip())


def render(folder):
    comparison = read_comparison([folder])
    summary = summarise(comparison.runs)
    return render_page(summary, make_sheets(summary), comparison.notes, {})


@pytest.fixture(scope="module")
def text(finished_runs):
    """The page of runs with all their files."""
    return render(finished_runs)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def run_text(finished_runs):
    """The page of one of them."""
    return render_run(read_comparison([finished_runs]).runs[0])


@pytest.mark.parametrize("which", ["text", "run_text"])
def test_a_page_needs_nothing_from_outside(which, request):
    text = request.getfixturevalue(which)
    page = Page(text)
    assert all(reference.startswith("#") for reference in page.references)
    assert not [tag for tag, _ in page.elements if tag in ("link", "img", "iframe", "object")]
    for word in ("@import", "@font-face", "url("):
        assert word not in text
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert len(text) < 1e6


def test_a_page_has_every_section_and_every_chart(page):
    assert page.headings == ["Ranking", "All figures", "Label split", "Time line of a round"]
    assert page.captions == [
        "Accuracy",
        "Kernel entropy",
        "Spread over the clients",
        "Images per client and class: dirichlet, seed 0",
        "Time line of round 2: static, seed 0",
        "Time line of round 2: fmdconv, seed 0",
    ]
    labels = {json.loads(script)["doc"]["version"] for script in page.scripts if script.startswith('{"')}
    assert len(labels) == 1


def test_the_most_accurate_for_the_same_cost_is_first(page):
    assert [a["value"] for tag, a in page.elements if tag == "input"] == [
        *("round", "virtual_s", "mb", "energy_kj", "gflops")
    ]
    assert page.tables["mb"] == [
        [
            "runsall on/off",
            "% at 10 MB",
            "final %",
            "MB in all",
            "MB to 75.0 %",
            "minus static",
            "on the front",
        ],
        ["1fmdconv", "83.0 ± 4.2", "83.0 ± 4.2", "10", "7.50 ± 3.54", "+8.0", "yes"],
        ["2static", "75.0 ± 7.1", "75.0 ± 7.1", "10", "10.0 (1 of 2)", "–", ""],
    ]
    shown = [a["data-cost"] for tag, a in page.elements if "data-cost" in a and "hidden" not in a]
    assert shown == ["round"]


def test_each_split_has_a_section_of_its_own(make_run):
    runs = [
        make_run([final], task=task, variant=conv, **{"model.conv": conv})
        for task, conv, final in (
            ("alpha 0.1", "static", 0.5),
            ("alpha 0.1", "fmdconv", 0.4),
            ("alpha 0.5", "static", 0.6),
            ("alpha 0.5", "fmdconv", 0.7),
        )
    ]
    summary = summarise(runs)
    page = Page(render_page(summary, make_sheets(summary), [], {}))
    assert page.headings[:2] == ["alpha 0.1", "alpha 0.5"]
    assert [row[0] for row in page.tables["round"]] == [
        *("runsall on/off", "1static", "2fmdconv", "runsall on/off", "1fmdconv", "2static")
    ]


def test_settings_that_only_some_runs_have_are_not_common(make_run):
    """A run's files keep `train.clip-norm` only where it is set."""
    clipped = make_run([0.5], variant="clipped", **{"train.clip-norm": 1.0})
    plain = make_run([0.5], variant="plain")
    for runs, common in (([clipped, plain], False), ([plain, clipped], False), ([clipped], True)):
        summary = summarise(runs)
        text = render_page(summary, make_sheets(summary), [], {})
        assert ("train.clip-norm" in text) is common
        assert "train.lr" in text


def test_a_chart_that_depends_on_no_difference_is_left_out(make_run):
    """All of these runs have as many rounds, and cost the same."""
    runs = [make_run([0.5], variant=name) for name in ("one", "two")]
    slow = replace(runs[1].rounds[0], virtual_s=99.0, latency_s=1.0)
    summary = summarise([runs[0], replace(runs[1], rounds=(slow,))])
    page = Page(render_page(summary, make_sheets(summary), [], {}))
    assert page.captions[1:3] == ["Final accuracy and cost of the whole run", "Final accuracy and latency"]
    assert [a["data-cost"] for tag, a in page.elements if tag == "figure" and "data-cost" in a] == [
        "virtual_s"
    ]


def test_a_page_of_centralised_runs_tells_of_epochs_and_of_no_clients(centralised_runs):
    text = render(centralised_runs)
    page = Page(text)
    assert page.headings == ["Ranking", "All figures"]
    assert page.captions == ["Accuracy", "Kernel entropy"]
    assert page.tables["train_s"][1][:2] == ["1fmdconv", "83.0 ± 4.2"]
    assert "centralised, 2 epochs in batches of 16, learning rate 0.05 (cosine)" in text
    assert "virtual" not in text
    assert "partition.alpha" not in text


def test_the_page_of_a_run_has_its_settings_rows_clients_split_and_time_line(run_text):
    page = Page(run_text)
    assert page.captions == [
        "Accuracy",
        "Kernel entropy",
        "Time line of round 2: static, seed 0",
        "Images per client and class: dirichlet, seed 0",
    ]
    assert page.headings == ["Rounds", "Clients"]
    lines = page.tables[""]
    assert ["model.conv", "static"] in lines
    assert [line[:2] for line in lines if len(line) > 15] == [
        *(["round", "virtual_s"], ["1", "10"], ["2", "20"]),
        *(["client", "round"], ["0", "2"], ["1", "2"]),
    ]


def test_the_page_of_a_run_stays_as_large_with_many_clients(finished_runs):
    (run, *_) = read_comparison([finished_runs]).runs
    (row, *_) = run.clients

    def page(clients):
        rows = [
            replace(row, client=client, round=2, device=f"device-{client % 3}", total_s=7.5 + client % 90)
            for client in range(clients)
        ]
        return render_run(replace(run, clients=tuple(rows), label_counts=np.full((clients, 2), 3)))

    few, many = page(150), page(10_000)
    assert len(many) < 1.02 * len(few)
    assert Page(many).headings == ["Rounds", "Clients by device"]
    header, *lines = [line for line in Page(many).tables[""] if len(line) > 10][-4:]
    assert header[:3] == ["device", "clients", "ok"]
    assert [line[:2] for line in lines] == [
        ["device-0", "3,334"],
        ["device-1", "3,333"],
        ["device-2", "3,333"],
    ]
    assert "100 of 10,000 clients, at even steps" in many


def test_the_page_of_an_unfinished_run_says_so(write_run):
    (run,) = read_comparison([write_run("half", [0.5])]).runs
    assert '<p class="note">Unfinished: 1 of 2 rounds.</p>' in render_run(run)


def test_runs_are_linked_where_they_have_pages(finished_runs):
    summary = summarise(read_comparison([finished_runs]).runs)
    runs = [run for group in summary.groups for run in group.runs]
    pages = {run: f"report_files/{place}.html" for place, run in enumerate(runs)}
    page = Page(render_page(summary, make_sheets(summary), [], pages))
    assert page.references[-4:] == list(pages.values())
    assert page.tables[""][-1][:3] == ["fmdconv", "1", "86.0"]
    home = Page(render_run(runs[0], home="../report.html", library_file="bokeh.min.js"))
    assert home.references == ["../report.html", "bokeh.min.js"]


def test_ids_are_unique_and_references_lead_somewhere(page):
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_a_page_opens_without_optional_files_and_tells_no_folders(write_run):
    text = render(write_run("secret", [0.5, 0.6], **{"data.dir": "/home/somebody"}))
    assert "Time line of a round" in Page(text).headings
    assert text.count("Nothing of this was kept of the runs.") == 2  # split, time line
    assert "Versions and machine were not kept" in text
    assert "somebody" not in text
    assert "secret" not in text


@pytest.fixture
def evil(make_run):
    """A run whose names of all kinds are markup, and another one."""
    run = make_run([0.5], clients=[0.5], variant=EVIL, **{"fleet.devices": "pi-4"})
    clients = [replace(row, device=EVIL, status=EVIL, reason=EVIL) for row in run.clients]
    environment = {"commit": EVIL, "versions": {EVIL: EVIL}, "machine": {"processor": EVIL}}
    return replace(run, clients=tuple(clients), environment=environment), make_run([0.6], variant="other")


def test_all_that_runs_say_is_text_not_markup(evil):
    summary = summarise(evil)
    for text in (render_page(summary, make_sheets(summary), [EVIL], {}), render_run(evil[0])):
        page = Page(text)
        assert not [tag for tag, _ in page.elements if tag == "img"]
        types = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
        assert sorted({kind for kind in types if kind}) == ["application/json", "text/plain"]
        assert types.count(None) == 1  # the page's own
        assert escape(EVIL) in text


def test_the_same_runs_give_the_same_page(text, finished_runs):
    assert render(finished_runs) == text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("which", ["page", "run"])
def test_a_browser_draws_every_chart_without_an_error(which, evil, finished_runs, tmp_path):
    summary = summarise([*read_comparison([finished_runs]).runs, evil[0]])
    text = render_run(evil[0]) if which == "run" else render_page(summary, make_sheets(summary), [EVIL], {})
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command += ["--enable-logging=stderr", "--virtual-time-budget=60000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert [line for line in messages if "document idle" not in line] == []
    assert done.stdout.count('class="chart"') == done.stdout.count("bk-Figure") > 0
