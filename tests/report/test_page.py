import re
from html.parser import HTMLParser

import pytest

from fedfmd.report.comparison import read_comparison
from fedfmd.report.page import render_page
from fedfmd.report.sheets import make_sheets
from fedfmd.report.statistics import summarise

VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Collects what a page holds; every element must be closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.headings, self.captions, self.references = [], [], [], [], []
        self.texts = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            inside = {"h2": self.headings, "figcaption": self.captions, "text": self.texts}
            inside.get(self.open[-1], []).append(text.strip())


def render(folder):
    comparison = read_comparison([folder])
    summary = summarise(comparison.runs)
    return render_page(summary, make_sheets(summary), comparison.notes)


@pytest.fixture(scope="module")
def text(finished_runs):
    """The page of runs with all their files."""
    return render(finished_runs)


@pytest.fixture(scope="module")
def page(text):
    """The same, page."""
    return Page(text)


def test_the_page_needs_nothing_from_outside(text, page):
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not links
    for word in ("<script", "<link", "@import", "@font-face"):
        assert word not in text


def test_the_page_has_every_section_and_every_plot_its_units(page):
    assert page.headings == [
        "Results",
        "Accuracy over rounds, time and compute",
        "Accuracy against cost",
        "IES and RCS",
        "Spread over the clients",
        "Label split",
        "Time line of a round",
        "Kernel entropy",
    ]
    assert {
        "test accuracy (%)",
        "round",
        "virtual time (s)",
        "training compute of all clients (FLOP)",
        "final test accuracy (%)",
        "virtual time of the run (s)",
        "training compute of the run (GFLOPs)",
        "bytes up and down in the run (MB)",
        "modelled latency per image (ms)",
        "IES, inference (ms) – lower is better",
        "RCS, inference (correct/s) – higher is better",
        "IES, training round (s) – lower is better",
        "RCS, training round (1/s) – higher is better",
        "accuracy on the client's own images (%)",
        "images",
        "virtual time since the start of the round (s)",
        "late, 60 s",
        "kernel entropy H(π)/ln K (no unit)",
    } <= set(page.texts)
    assert {"static, seed 0, round 2", "Images per client and class: dirichlet, seed 0"} <= set(page.captions)


def test_a_page_of_centralised_runs_tells_of_epochs_and_of_no_clients(centralised_runs):
    text = render(centralised_runs)
    page = Page(text)
    assert page.headings == [
        "Results",
        "Accuracy over epochs, time and compute",
        "Accuracy against cost",
        "IES and RCS",
        "Kernel entropy",
    ]
    assert {"epoch", "training time (s)", "IES, training epoch (s) – lower is better"} <= set(page.texts)
    assert "centralised, 2 epochs in batches of 16, learning rate 0.05 (cosine)" in text
    assert "virtual" not in text
    assert "partition.alpha" not in text


def test_ids_are_unique_and_references_lead_somewhere(text, page):
    assert len(page.ids) == len(set(page.ids))
    inner = {reference[1:] for reference in page.references if reference.startswith("#")}
    inner |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert inner <= set(page.ids)


def test_plots_scale_with_the_page(text):
    drawings = re.findall(r"<svg [^>]*role=\"img\"[^>]*>", text)
    assert len(drawings) == text.count("<figure>")
    assert all("viewBox" in one and " width=" not in one and " height=" not in one for one in drawings)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


def test_the_page_opens_without_optional_files_and_tells_no_folders(write_run):
    text = render(write_run("secret", [0.5, 0.6], **{"data.dir": "/home/somebody"}))
    assert "Time line of a round" in Page(text).headings
    assert text.count("Nothing of this was kept of the runs.") == 3  # clients, split, time line
    assert "Versions and machine were not kept" in text
    assert "somebody" not in text
    assert "secret" not in text


def test_notes_and_names_are_text_not_markup(make_run):
    summary = summarise([make_run([0.5], variant="<b>&"), make_run([0.6], variant="other")])
    text = render_page(summary, make_sheets(summary), ["<script>"])
    assert '<p class="note">&lt;script&gt;</p>' in text
    assert "<script>" not in text
    assert "<b>" not in text


def test_the_same_runs_give_the_same_page(text, finished_runs):
    assert render(finished_runs) == text
