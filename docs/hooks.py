"""Pages of the site that are made of files elsewhere in the repository, and links that leave `docs`.

Files and links work on GitHub as they are. In the site a link to a file with a page of its own leads there, a picture
becomes part of the site, and any other file is linked in the repository.
"""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

from fedfmd.experiment.reference import all_settings

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/benchmarks/README.md": "benchmarks.md",
    "experiments/deploy/README.md": "deployment.md",
    "experiments/gpu/README.md": "gpu.md",
    "experiments/paper/README.md": "paper.md",
    "experiments/results/README.md": "results.md",
    "experiments/studies/README.md": "studies.md",
    "fedfmd/settings.py": "settings.md",
}
"""Pages of the site by the file that they show."""

PICTURES = (".png", ".svg")
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and all pictures that pages show."""
    for source, page in PAGES.items():
        text = settings_page() if source.endswith(".py") else (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    sources = [*(ROOT / source for source in PAGES), *(ROOT / "docs").rglob("*.md")]
    for picture in sorted({picture for source in sources for picture in _pictures(source)}):
        files.append(File.generated(config, _place(picture), abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links that lead somewhere in the site."""
    del files
    shown = {place: source for source, place in PAGES.items()}
    place = page.file.src_uri
    source = shown.get(place, f"docs/{place}")

    def lead(link: re.Match[str]) -> str:
        head, path, anchor = link[1], link[2], link[3] or ""
        target = _target(source, path)
        if target in PAGES or target.startswith("docs/") or target.endswith(PICTURES):
            to = PAGES.get(target) or (_place(target) if target.endswith(PICTURES) else target[5:])
            return f"{head}{relpath(to, dirname(place) or '.')}{anchor})"
        return f"{head}{config.repo_url}/blob/main/{target}{anchor})"

    return LINK.sub(lead, markdown)


def settings_page() -> str:
    """Return the page of all settings, a section for each group."""
    lines = ["# Settings", "", "`fedfmd settings [WORDS]` shows them in the terminal."]
    group = itemgetter(0)
    grouped = sorted(((setting.key.rpartition(".")[0], setting) for setting in all_settings()), key=group)
    for name, settings in groupby(grouped, key=group):
        lines += ["", f"## {name or 'Of the run'}", ""]
        lines += ["| setting | default | meaning | allowed |", "|---|---|---|---|"]
        for _, setting in settings:
            default = f"`{setting.default}`" if setting.default != "" else "none"
            cells = (f"`{setting.key}`", default, setting.meaning, setting.allowed)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _pictures(source: Path) -> list[str]:
    name = source.relative_to(ROOT).as_posix()
    links = LINK.findall(source.read_text(encoding="utf-8"))
    return [_target(name, path) for _, path, _ in links if path.endswith(PICTURES)]


def _target(source: str, path: str) -> str:
    """Return what a link in a file leads to, both from the repository's root."""
    return normpath(join(dirname(source), path))


def _place(picture: str) -> str:
    """Return where a picture of the repository stands in the site."""
    return f"pictures/{picture.replace('/', '-')}"
