"""The one place of the runtime that calls huggingface_hub: few questions, each with an error of one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from vtp.engines.errors import VtpError
from vtp.runtime.hub.names import HubName, is_commit, repo_folder
from vtp.runtime.hub.reasons import explained

_PATIENCE = 10.0  # seconds that the hub has to answer
_MANY = 500  # paths that are asked about at once


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it; `sha256` is None for small ones, which it keeps in git."""

    bytes: int
    sha256: str | None


def library() -> ModuleType:
    """huggingface_hub. Raises VtpError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError as error:
        raise VtpError(
            "bundles of the Hugging Face hub need huggingface_hub, which is not installed; run: "
            "pip install 'vtp-edge[hub]'"
        ) from error
    return huggingface_hub


def cache() -> Path:
    """The hub's cache: $HF_HUB_CACHE, or hub in $HF_HOME."""
    return Path(library().constants.HF_HUB_CACHE).expanduser()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    return bool(library().constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The hub's address: $HF_ENDPOINT, or https://huggingface.co."""
    return str(library().constants.ENDPOINT)


@contextmanager
def quiet(bars: bool) -> Iterator[None]:
    """Keep the library's own warnings from the terminal, and its bars unless `bars` is set on a terminal."""
    bars = bars and sys.stderr is not None and sys.stderr.isatty()
    utils, logger = library().utils, logging.getLogger("huggingface_hub")
    level, hide = logger.level, not bars and not utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if hide:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hide:
            utils.enable_progress_bars()


@contextmanager
def asking(name: HubName, sending: bool = False) -> Iterator[None]:
    """Turn what the library raises into one line about `name`: Unreached if no answer came, else VtpError."""
    try:
        yield
    except VtpError:
        raise
    except Exception as error:  # the hub library's errors share no base class
        raise explained(error, name, endpoint(), sending) from error


def commit_of(name: HubName) -> str:
    """The commit that a revision is now. Asks the hub."""
    with asking(name):
        info = (
            library().HfApi().model_info(name.repo, revision=name.revision, timeout=_PATIENCE, expand=["sha"])
        )
    commit = str(info.sha)
    if not is_commit(commit):
        raise VtpError(f"the hub names no commit of {name}; check HF_ENDPOINT ({endpoint()})")
    return commit


def cached_commit(name: HubName) -> str | None:
    """The commit that a revision was when the hub was last asked; None: not in the cache."""
    if name.pinned:
        return name.revision
    try:
        found = (repo_folder(cache(), name) / "refs" / name.revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return found if is_commit(found) else None


def describe(name: HubName, paths: Sequence[str]) -> dict[str, RemoteFile]:
    """What the hub says of some files of a commit, by path; those that are not there are left out."""
    found: dict[str, RemoteFile] = {}
    with asking(name):
        for first in range(0, len(paths), _MANY):
            some = list(paths[first : first + _MANY])
            for info in library().HfApi().get_paths_info(name.repo, some, revision=name.revision):
                if hasattr(info, "size"):  # a folder has none
                    lfs = info.lfs
                    found[info.path] = RemoteFile(int(info.size), lfs.sha256 if lfs else None)
    return found


def download(name: HubName, path: str) -> Path:
    """A file of a commit, in the cache: fetched, unless it is there already."""
    with asking(name):
        return Path(
            library().hf_hub_download(name.repo, path, revision=name.revision, etag_timeout=_PATIENCE)
        )


def cached_file(name: HubName, path: str) -> Path | None:
    """A file of a commit, if the cache has it."""
    found = library().try_to_load_from_cache(name.repo, path, revision=name.revision)
    return Path(found) if isinstance(found, str) else None
