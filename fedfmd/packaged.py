"""Files that come with the package: experiments to run by name, and templates that ``fedfmd init`` copies."""

from __future__ import annotations

from pathlib import Path

from fedfmd.errors import SettingsError, nearest_of

PACKAGE = Path(__file__).parent

EXAMPLES = (PACKAGE / "examples", PACKAGE.parent / "experiments")
"""Where the experiments may lie: in the package, which is where a wheel has them, or beside it, as in a clone."""

TEMPLATES = PACKAGE / "templates"


def examples() -> dict[str, Path]:
    """Return the files of the experiments that come with the package, by name."""
    folder = next(filter(Path.is_dir, EXAMPLES))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_experiment(path: Path) -> Path:
    """Return the file that is meant: this one, or the example of that name where there is no such file.

    Raises:
        SettingsError: it is a bare name, but no example's.
    """
    if path.is_file() or path.suffix or path.parent != Path():
        return path
    known = examples()
    if path.name not in known:
        raise SettingsError(
            f"no file {path}, and no example is called so: the examples are {', '.join(known)}; did you mean "
            f"{nearest_of(path.name, [*known, *map(str, Path().glob('*.yaml'))])!r}?"
        )
    return known[path.name]


def copy_templates(folder: Path) -> list[Path]:
    """Copy the templates into `folder`, which is made if it isn't there; returns the new files.

    Raises:
        SettingsError: one of them would overwrite a file; nothing was written.
        OSError: the folder can't be written to.
    """
    templates = {
        folder / path.name: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.*"))
    }
    if there := next((path for path in templates if path.exists()), None):
        raise SettingsError(f"{there} is there already and stays as it is: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in templates.items():
        path.write_text(text, encoding="utf-8")
    return list(templates)
