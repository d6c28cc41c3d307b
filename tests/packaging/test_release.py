"""make release: what stops one, and what one that goes through leaves behind."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _loaded() -> Any:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RELEASE = _loaded()
SAID = "# Changelog\n\n## [Unreleased]\n\n### Fixed\n\n- A thing.\n\n## [0.1.0] - 2026-01-01\n\n- All.\n"


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the three files that a release changes, committed."""
    root = tmp_path / "repository"
    (root / "vtp").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0.1.0"\n')
    (root / "vtp/__init__.py").write_text('__version__ = "0.1.0"\n')
    (root / "CHANGELOG.md").write_text(SAID)
    git(root, "init", "--quiet")
    for name, value in (("name", "A"), ("email", "a@example.org")):
        git(root, "config", f"user.{name}", value)
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "begin")
    return root


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Versions that packages were built of: tests/packaging/test_files.py builds real ones."""
    versions: list[str] = []

    def build(tree: Path, out: Path) -> list[Path]:
        versions.append(RELEASE.written_version(tree))
        out.mkdir()
        (out / f"x-{versions[-1]}.tar.gz").write_bytes(b"made")
        return sorted(out.iterdir())

    monkeypatch.setattr(RELEASE, "build", build)
    return versions


def test_this_trees_version_is_written_alike_and_its_changelog_can_be_released() -> None:
    version = RELEASE.written_version(ROOT)
    assert RELEASE.numbers(version)
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = RELEASE.released(text, "99.0.0", "2099-01-01")
    assert "## [Unreleased]\n\n## [99.0.0] - 2099-01-01\n" in moved
    assert moved.replace("## [99.0.0] - 2099-01-01\n\n", "") == text


def test_a_rehearsal_builds_and_changes_nothing(root: Path, built: list[str]) -> None:
    before = git(root, "rev-parse", "HEAD")
    said = RELEASE.release(root, "0.2.0", go=False)
    assert built == ["0.2.0"] and "a rehearsal" in said[-1]
    assert (git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")) == (before, "")
    assert not git(root, "tag") and not (root / "dist").exists()


def test_a_release_is_committed_tagged_and_not_uploaded(root: Path, built: list[str]) -> None:
    said = RELEASE.release(root, "0.2.0", go=True)
    assert RELEASE.written_version(root) == "0.2.0"
    assert "## [Unreleased]\n\n## [0.2.0] - " in (root / "CHANGELOG.md").read_text()
    assert git(root, "log", "-1", "--format=%s", "v0.2.0") == "release: 0.2.0"
    assert sorted(git(root, "show", "--format=", "--name-only").split()) == sorted(
        [*RELEASE.PLACES, "CHANGELOG.md"]
    )
    assert said[-2:] == ["  git push origin HEAD v0.2.0", "  twine upload dist/x-0.2.0.tar.gz"]
    assert (root / "dist/x-0.2.0.tar.gz").read_bytes() == b"made"


@pytest.mark.parametrize(
    ("version", "change", "why"),
    [
        ("0.1.0", {}, "0.1.0 is not above 0.1.0"),
        ("0.0.9", {}, "0.0.9 is not above 0.1.0"),
        ("0.2", {}, "0.2 is not a valid version; write three numbers"),
        ("v0.2.0", {}, "v0.2.0 is not a valid version"),
        ("0.2.0", {"new.txt": ""}, "1 files are changed or new; commit or remove them"),
        ("0.2.0", {"vtp/__init__.py": '__version__ = "0.1.1"\n'}, "the version is not the same everywhere"),
        ("0.2.0", {"CHANGELOG.md": SAID.replace("- A thing.", "")}, "says nothing under Unreleased"),
        ("0.2.0", {"CHANGELOG.md": "# Changelog\n"}, "has no heading"),
        ("0.2.0", {"CHANGELOG.md": SAID.replace("[0.1.0]", "[0.2.0]")}, "has a heading for 0.2.0 already"),
        ("0.3.0", {"tag": "v0.3.0"}, "the tag v0.3.0 exists already"),
    ],
)  # fmt: skip
def test_what_stops_a_release_is_one_line(
    root: Path, built: list[str], version: str, change: dict[str, str], why: str
) -> None:
    for name, text in change.items():
        if name == "tag":
            git(root, "tag", text)
        else:
            (root / name).write_text(text)
    if set(change) <= {"vtp/__init__.py", "CHANGELOG.md"} and change:
        git(root, "commit", "--quiet", "-am", "change")
    before = git(root, "rev-parse", "HEAD")
    with pytest.raises(RELEASE.NotReady, match=why):
        RELEASE.release(root, version, go=True)
    assert (built, git(root, "rev-parse", "HEAD")) == ([], before)


def test_a_build_that_fails_or_warns_stops_it(tmp_path: Path) -> None:
    import sys

    with pytest.raises(RELEASE.NotReady, match=r"(?s)build failed:.*gone wrong"):
        RELEASE._run("build", [sys.executable, "-c", "raise SystemExit('gone wrong')"])
    with pytest.raises(RELEASE.NotReady, match="build warned: a Warning of something"):
        RELEASE._run("build", [sys.executable, "-c", "print('fine'); print('a Warning of something')"])
    RELEASE._run("build", [sys.executable, "-c", "print('fine')"])
