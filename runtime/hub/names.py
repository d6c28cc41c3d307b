"""What names a bundle of the Hugging Face hub, and what is a path: org/name, org/name@revision, hf://org/name.

A folder that is there wins over the hub's name, and so does a path into a folder that is there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vtp.engines.errors import UsageError, quoted, quoted_argument, shown

MAIN = "main"
SCHEME = "hf://"
VIEWS = "vtp"  # folder of checked bundles within the hub's cache of one repository
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(f"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, "org/name", and a branch, tag or commit of it."""

    repo: str
    revision: str = MAIN

    @property
    def name(self) -> str:
        """The part behind the slash."""
        return self.repo.partition("/")[2]

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return is_commit(self.revision)

    def __str__(self) -> str:
        return self.repo if self.revision == MAIN else f"{self.repo}@{self.revision}"


def hub_name(given: str | Path, revision: str | None = None) -> HubName | None:
    """The name on the hub that `given` is; None for a path.

    Raises UsageError for what is neither, for `hf://` with something else behind it, for a revision that no
    repository can have, and for a revision beside a path or beside another one.
    """
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"a bundle is a path, or ORG/NAME of the hub, not {quoted_argument(given)}")
    text = given if isinstance(given, str) else ""
    explicit = text.startswith(SCHEME)
    repo, at, asked = text.removeprefix(SCHEME).partition("@")
    if not is_repo(repo):
        if explicit:
            raise UsageError(
                f"{shown(text)} is not a name on the Hugging Face hub; give hf://ORG/NAME or "
                "hf://ORG/NAME@REVISION"
            )
        _refuse_revision(given, revision)
        return None
    if not explicit and (_exists(text) or (not at and _exists(repo.partition("/")[0]))):
        _refuse_revision(given, revision)
        return None
    if at and revision is not None:
        raise UsageError(f"{shown(text)} has a revision, and revision= is another one; give one of them")
    wanted = asked if at else MAIN if revision is None else revision
    return HubName(repo, _checked(wanted))


def parse_repo(text: str) -> HubName:
    """A repository to write to, "org/name". Raises UsageError for anything else."""
    repo = text.removeprefix(SCHEME) if isinstance(text, str) else ""
    if not is_repo(repo):
        raise UsageError(f"{quoted(text, 100)} is not a name on the Hugging Face hub; give ORG/NAME")
    return HubName(repo)


def is_repo(text: str) -> bool:
    """Whether the hub may have a repository of that name."""
    fits = _REPO.fullmatch(text) is not None and "--" not in text and ".." not in text
    return fits and not text.endswith(".git")


def is_commit(text: str) -> bool:
    """Whether a revision is a commit's full hash."""
    return _COMMIT.fullmatch(text) is not None


def origin_of(folder: Path) -> HubName | None:
    """Of which repository and commit a bundle's folder is, if it lies among the hub's: see `view_folder`."""
    parts = folder.absolute().parts[-3:]
    if len(parts) < 3 or parts[1] != VIEWS or not is_commit(parts[2]):
        return None
    kind, dashes, repo = parts[0].partition("--")
    repo = repo.replace("--", "/")
    return HubName(repo, parts[2]) if kind == "models" and dashes and is_repo(repo) else None


def view_folder(cache: Path, name: HubName, commit: str) -> Path:
    """Where in the hub's cache a bundle lies once it is whole and checked."""
    return repo_folder(cache, name) / VIEWS / commit


def repo_folder(cache: Path, name: HubName) -> Path:
    """What the hub's cache has of one repository."""
    return cache / f"models--{name.repo.replace('/', '--')}"


def display_name(given: str | Path) -> str:
    """A bundle's own name: the folder's, or the repository's without its organisation."""
    name = hub_name(given) or origin_of(Path(given))
    return name.name if name else Path(given).resolve().name


def _refuse_revision(given: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(
            f"revision= belongs to a bundle of the hub, and {shown(given)} is a path here; leave it out, or "
            "give hf://ORG/NAME"
        )


def _checked(revision: str) -> str:
    known = isinstance(revision, str) and _REVISION.fullmatch(revision) is not None
    fits = known and ".." not in revision and "//" not in revision
    if not fits or revision.endswith(("/", ".", ".lock")):
        raise UsageError(
            f"{quoted(revision, 60)} is not a revision; give a branch, a tag or a commit, as in ORG/NAME@v1"
        )
    return revision


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
