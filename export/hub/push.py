"""A folder into a repository of the hub: checked before, sent as one commit, its model card with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp.engines.disk.files import is_file, sha256
from vtp.engines.errors import UsageError, VtpError, shown
from vtp.engines.strict_json import FILE_BYTES, read_json
from vtp.export.hub.card import card
from vtp.runtime.bundle.folder import MANIFEST, is_inside, open_bundle
from vtp.runtime.bundle.manifest import parse_manifest
from vtp.runtime.hub import client
from vtp.runtime.hub.bundles import check_names, size_of
from vtp.runtime.hub.names import HubName, parse_repo

CARD = "README.md"
RECORD = "vtp.json"  # of a folder for transformers.js
_OWN = {CARD, ".gitattributes"}  # what a new repository may hold
Say = Callable[[str], None]


@dataclass(frozen=True)
class Pushed:
    """What lies on the hub now: the commit that brought it, and its page."""

    repo: str
    commit: str
    url: str

    def to_json(self) -> dict[str, str]:
        """What --json prints."""
        return {"repo": self.repo, "commit": self.commit, "url": self.url}


def push(
    bundle: str | Path,
    repo: str,
    private: bool = False,
    say: Say = lambda _: None,
    base_model: str | None = None,
    bars: bool = True,
) -> Pushed:
    """Put a bundle's folder into the hub's repository "org/name", which is made if it is not there.

    private     the repository is for you alone; one that is there and public is refused
    say         gets a line about what is sent
    base_model  the model's name on the hub, for the card; None: what the manifest says
    bars        show huggingface_hub's progress bars on a terminal

    The token is the one that hf auth login keeps, or $HF_TOKEN. Every file's sha256 is compared first,
    README.md is made from the manifest, and graphs of an earlier bundle there that this one lacks are
    removed, all in one commit. Raises UsageError for a name that is none, VtpError for what cannot be sent.
    """
    with client.quiet(bars):
        base = None if base_model is None else parse_repo(base_model).repo
        name = check_target(repo, MANIFEST, private)
        opened = open_bundle(Path(bundle), check_hashes=True)
        check_names(opened.manifest)
        files = {path: opened.path(path) for path in (MANIFEST, *opened.manifest.files)}
        text = card(opened.manifest, name, base)
        return _send(name, private, {**files, CARD: text.encode()}, say)


def push_transformers_js(
    folder: Path, repo: str, private: bool = False, say: Say = lambda _: None, bars: bool = True
) -> Pushed:
    """The same with a folder of layout transformers.js, whose README.md is its card."""
    with client.quiet(bars):
        name = check_target(repo, RECORD, private)
        files = {RECORD: folder / RECORD, **_recorded(folder)}
        return _send(name, private, files, say)


def _recorded(folder: Path) -> dict[str, Path]:
    """The files that vtp.json names, none of them elsewhere or changed. Raises VtpError."""
    record = read_json(folder / RECORD)
    named = record.get("files") if isinstance(record, dict) else None
    if not isinstance(named, dict) or not named:
        raise VtpError(f"{folder / RECORD} names no files; lay the folder out again")
    files = {path: folder / path for path in named}
    for path, file in files.items():
        whole = is_inside(path) and is_file(file) and file.resolve().is_relative_to(folder.resolve())
        info = named[path] if isinstance(named[path], dict) else {}
        if not whole or sha256(file) != info.get("sha256"):
            raise VtpError(f"{shown(path)} is not what {RECORD} says of it; lay the folder out again")
    return files


def check_target(repo: str, kind: str, private: bool) -> HubName:
    """Refuse, before any work, a repository that cannot be written to or that holds something else.

    kind  the file by which a repository of this kind is known
    """
    name = parse_repo(repo)
    library = client.library()
    if client.is_offline():
        raise VtpError(f"HF_HUB_OFFLINE forbids to push {name.repo}; unset it")
    if library.get_token() is None:
        raise VtpError(f"pushing {name.repo} needs a token: log in with hf auth login, or set HF_TOKEN")
    with client.asking(name, sending=True):
        library.HfApi().whoami()
    there = _look(name)
    if there is None:
        return name
    if private and not there.private:
        raise UsageError(
            f"{name.repo} is on the hub and public, so --private cannot hold; make it private in its "
            "settings, or choose another name"
        )
    held = {one.rfilename for one in there.siblings or ()}
    if held - _OWN and kind not in held:
        raise UsageError(
            f"{name.repo} on the hub holds {shown(min(held - _OWN), 60)} and no {kind}, so it is something "
            "else; choose another name"
        )
    return name


def _look(name: HubName) -> Any:
    """The hub's information about a repository; None if there is none that one may see."""
    try:
        with client.asking(name, sending=True):
            return client.library().HfApi().model_info(name.repo)
    except VtpError as error:
        if type(error.__cause__).__name__ == "RepositoryNotFoundError":
            return None
        raise


def _send(name: HubName, private: bool, files: Mapping[str, Path | bytes], say: Say) -> Pushed:
    """One commit that holds all files, or none."""
    library, api = client.library(), client.library().HfApi()
    total = sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())
    say(f"{name.repo}: {len(files)} files, {size_of(total)} to send")
    with client.asking(name, sending=True):
        api.create_repo(name.repo, private=private or None, exist_ok=True)
        changes: list[Any] = [
            library.CommitOperationAdd(path, file if isinstance(file, bytes) else str(file))
            for path, file in files.items()
        ]
        changes += [library.CommitOperationDelete(path) for path in _stale(name, files)]
        done = api.create_commit(name.repo, changes, commit_message="Upload a bundle of vtp")
    return Pushed(name.repo, done.oid, f"{client.endpoint()}/{name.repo}")


def _stale(name: HubName, files: Mapping[str, Any]) -> Sequence[str]:
    """Files of the bundle that the repository holds now, as its manifest names them, and this one lacks."""
    found = client.describe(name, [MANIFEST])
    if MANIFEST not in files or MANIFEST not in found or found[MANIFEST].bytes > FILE_BYTES:
        return []
    try:
        manifest = parse_manifest(
            client.download(HubName(name.repo, client.commit_of(name)), MANIFEST).read_bytes()
        )
        check_names(manifest)
    except (VtpError, json.JSONDecodeError):
        return []
    held = client.describe(name, list(manifest.files))
    return sorted(set(held) - set(files))
