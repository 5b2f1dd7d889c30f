from importlib.util import spec_from_file_location

import pytest

from fedfmd.runs import code_digest, provenance


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Takes the digest of packages with these files below a folder of this name."""

    def digest(files, root="site", own=()):
        for package in provenance.PACKAGES:
            for name, content in ({"__init__.py": ""} | files).items():
                path = tmp_path / root / package / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
        monkeypatch.setattr(
            provenance,
            "find_spec",
            lambda name: spec_from_file_location(name, tmp_path / root / name / "__init__.py"),
        )
        code_digest.cache_clear()
        return code_digest(*own)

    yield digest
    code_digest.cache_clear()


def test_equal_sources_have_equal_digests_wherever_they_lie(digest):
    files = {"a.py": "x = 1", "edge/devices.yaml": "pi: 1"}
    others = {"notes.txt": "other", "examples/a.yaml": "base: {}", "templates/own.py": "x = 2"}
    assert digest(files) == digest(files | others, root="other")


@pytest.mark.parametrize(
    "files",
    [
        {"a.py": "x = 2", "b/c.py": ""},
        {"a.py": "x = 1", "b/d.py": ""},
        {"a.py": "x = 1"},
        {"a.py": "x = 1", "b/c.py": "", "devices.yaml": ""},
    ],
    ids=["content", "name", "missing", "data"],
)
def test_any_change_of_code_or_data_gives_another_digest(digest, files):
    assert digest(files, root="changed") != digest({"a.py": "x = 1", "b/c.py": ""})


def test_a_users_own_file_counts(digest, tmp_path):
    own = tmp_path / "mine.py"
    digests = {digest({})}
    for content in ("x = 1", "x = 2"):
        own.write_text(content)
        digests.add(digest({}, own=[own]))
    assert len(digests) == 3


def test_a_process_calls_its_code_by_one_name(digest, tmp_path):
    before = digest({})
    (tmp_path / "site" / "fedfmd" / "__init__.py").write_text("x = 1")
    assert code_digest() == before
