"""Makes a release: `make release VERSION=0.2.0` rehearses it, `make release VERSION=0.2.0 GO=1` does it.

The tree must be clean, the version new and higher, and CHANGELOG.md must say something under Unreleased. In a
copy of the commit the version is written into pyproject.toml and vtp/__init__.py and the changelog's heading
moved; sdist and wheel are built there and checked as the package index will. Only then, and only with --go,
the three files are written here, committed and tagged, and the packages put into dist/. Nothing is uploaded:
the command that does is printed at the end.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where the version stands: the file, and what is before and behind it.
PLACES = {
    "pyproject.toml": r'(?m)^(version = ")([^"]+)(")$',
    "vtp/__init__.py": r'(?m)^(__version__ = ")([^"]+)(")$',
}
CHANGELOG = "CHANGELOG.md"
_UNRELEASED = re.compile(r"(?ms)^## \[Unreleased\]\n(?P<said>.*?)(?=^## \[|\Z)")


class NotReady(Exception):
    """Why there can be no release, and what to do, in one line."""


def written_version(root: Path) -> str:
    """The version, which all of `PLACES` must say alike."""
    found = {}
    for name, pattern in PLACES.items():
        matches = re.findall(pattern, (root / name).read_text(encoding="utf-8"))
        if len(matches) != 1:
            raise NotReady(f"{name} holds {len(matches)} versions; one line is to say it")
        found[name] = matches[0][1]
    if len(set(found.values())) > 1:
        raise NotReady(
            "the version is not the same everywhere: " + ", ".join(map(" has ".join, found.items()))
        )
    return found["pyproject.toml"]


def numbers(version: str) -> tuple[int, ...]:
    """0.2.0 as (0, 2, 0), by which versions are ordered."""
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise NotReady(f"{version} is not a valid version; write three numbers, such as 0.2.0")
    return tuple(map(int, version.split(".")))


def released(changelog: str, version: str, day: str) -> str:
    """The changelog with what is unreleased under the version's own heading, and room for what comes next."""
    found = _UNRELEASED.search(changelog)
    if not found:
        raise NotReady(f"{CHANGELOG} has no heading ## [Unreleased]")
    if not re.search(r"^- ", found["said"], flags=re.MULTILINE):
        raise NotReady(f"{CHANGELOG} says nothing under Unreleased; write what changes for users")
    if f"\n## [{version}]" in changelog:
        raise NotReady(f"{CHANGELOG} has a heading for {version} already")
    return changelog.replace("## [Unreleased]\n", f"## [Unreleased]\n\n## [{version}] - {day}\n", 1)


def set_version(root: Path, version: str, day: str) -> None:
    """Write version and changelog into a tree."""
    for name, pattern in PLACES.items():
        text = (root / name).read_text(encoding="utf-8")
        (root / name).write_text(re.sub(pattern, rf"\g<1>{version}\g<3>", text), encoding="utf-8")
    changelog = (root / CHANGELOG).read_text(encoding="utf-8")
    (root / CHANGELOG).write_text(released(changelog, version, day), encoding="utf-8")


def git(root: Path, *words: str) -> str:
    """What git says; raises NotReady if it fails."""
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotReady(f"git {words[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def check(root: Path, version: str) -> None:
    """Raise NotReady unless this tree can become that version."""
    changed = git(root, "status", "--porcelain")
    if changed:
        raise NotReady(f"{len(changed.splitlines())} files are changed or new; commit or remove them")
    now = written_version(root)
    if numbers(version) <= numbers(now):
        raise NotReady(f"{version} is not above {now}, the version of this tree")
    if git(root, "tag", "--list", f"v{version}"):
        raise NotReady(f"the tag v{version} exists already")


def copy_of_commit(root: Path, folder: Path) -> Path:
    """The files of HEAD, links as links, in `folder`."""
    archive = folder.with_suffix(".tar")
    git(root, "archive", "--format=tar", "-o", str(archive), "HEAD")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder


def build(tree: Path, out: Path) -> list[Path]:
    """Build sdist and wheel as the index' users get them, and check them; raises NotReady."""
    _run("build", [sys.executable, "-m", "build", "--outdir", str(out), str(tree)])
    made = sorted(out.iterdir())
    _run("twine check", [sys.executable, "-m", "twine", "check", "--strict", *map(str, made)])
    return made


def _run(what: str, command: list[str]) -> None:
    apart = ("VTP_MODELS", "PYTHONDONTWRITEBYTECODE")  # a developer's own settings; the second makes it warn
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode:
        raise NotReady(f"{what} failed:\n{said.strip()}")
    warned = [line.strip() for line in said.splitlines() if re.search(r"warning", line, flags=re.IGNORECASE)]
    if warned:
        raise NotReady(f"{what} warned: {warned[0]}")


def release(root: Path, version: str, go: bool) -> list[str]:
    """Rehearse, or do, the release of what is committed; gives what to say of it. Raises NotReady."""
    check(root, version)
    day = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as temporary:
        tree = copy_of_commit(root, Path(temporary) / "tree")
        set_version(tree, version, day)
        made = build(tree, Path(temporary) / "dist")
        said = [f"{path.name}: {path.stat().st_size / 1e6:.1f} MB" for path in made]
        if not go:
            return [*said, f"a rehearsal: nothing was changed; make release VERSION={version} GO=1 does it"]
        set_version(root, version, day)
        git(root, "commit", "--quiet", "-m", f"release: {version}", "--", *PLACES, CHANGELOG)
        git(root, "tag", "-a", f"v{version}", "-m", f"vtp {version}")
        (root / "dist").mkdir(exist_ok=True)
        kept = [shutil.copy(path, root / "dist" / path.name) for path in made]
    upload = ["twine", "upload", *(str(Path(path).relative_to(root)) for path in kept)]
    return [
        *said,
        f"committed and tagged v{version}; nothing was uploaded. What makes it public:",
        f"  git push origin HEAD v{version}",
        f"  {' '.join(upload)}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check, build and tag a release; upload nothing.")
    parser.add_argument("version", help="three numbers, such as 0.2.0")
    parser.add_argument("--go", action="store_true", help="commit and tag; else only rehearse (the default)")
    args = parser.parse_args(argv)
    try:
        print("\n".join(release(ROOT, args.version, args.go)))
    except NotReady as error:
        print(f"release: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
