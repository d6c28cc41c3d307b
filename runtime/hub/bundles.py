"""A bundle of the hub as a folder of this machine: fetched by its manifest, checked, then put in its place.

A repository is a stranger's. Of its files only those are fetched that its manifest names, under names that a
bundle's files have, and after their sizes were compared and said. What came is held against the manifest,
sha256 by sha256, before the folder appears: `vtp/<commit>` in the hub's own cache of that repository. Its
files are the cache's own (hard links, or copies where the disk has none), so no link leads anywhere, and
engines that refuse linked weights take them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vtp.engines.disk.files import free_disk, read_bounded
from vtp.engines.disk.whole import whole_file, whole_folder
from vtp.engines.errors import VtpError, shown
from vtp.engines.strict_json import FILE_BYTES
from vtp.runtime.bundle.folder import MANIFEST, open_bundle
from vtp.runtime.bundle.manifest import TOKENIZER, FileInfo, Manifest, parse_manifest
from vtp.runtime.hub import client
from vtp.runtime.hub.client import RemoteFile
from vtp.runtime.hub.names import HubName, hub_name, repo_folder, view_folder
from vtp.runtime.hub.reasons import Unreached
from vtp.runtime.shell import command_line

Say = Callable[[str], None]

# What vtp-export and vtp-calib write: graphs, their weights, the tokenizer. No engine is among them.
_GRAPH_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}\.onnx(\.data)?")
_MOST_FILES = 2000
_LIMIT = "VTP_HUB_MAX_GB"
_LIMIT_GB = 100.0
_SPARE = 64 << 20  # bytes that the disk keeps


def local_bundle(
    given: str | Path, revision: str | None = None, say: Say = lambda _: None, bars: bool = True
) -> Path:
    """The folder of a bundle: `given` itself if it is a path; a name on the hub is fetched and checked.

    given     a path, or "org/name", "org/name@revision" or "hf://org/name" (see `hub_name`)
    revision  a branch, tag or commit of the hub's repository; None: main
    say       gets a line about what is fetched, before it is, and one that names the commit
    bars      show huggingface_hub's progress bars on a terminal

    What the hub's cache holds of that commit is not fetched again; with HF_HUB_OFFLINE, or if the hub does
    not answer, the newest that the cache holds of the revision is taken. Raises VtpError for what is not
    available, and for what is not a bundle or is not what its manifest says; UsageError for a bad revision.
    """
    name = hub_name(given, revision)
    if name is None:
        return _path(given)
    with client.quiet(bars):
        return _fetched(name, say)


def _path(given: str | Path) -> Path:
    """A path that the system takes, whether or not something lies there."""
    try:
        Path(given).stat()
    except ValueError as error:
        raise VtpError(f"no bundle at {shown(given, 60)}: no path is called so; give another") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise VtpError(f"no bundle at {shown(given, 60)}: the name is too long for a path") from error
    return Path(given)


def _fetched(name: HubName, say: Say) -> Path:
    commit, asked = _resolve(name, say)
    exact = replace(name, revision=commit)
    folder = view_folder(client.cache(), name, commit)
    if not folder.is_dir():
        _bring(exact, folder, asked, say)
    if asked and not name.pinned:
        _remember(name, commit)
    say(f"bundle {exact}")
    return folder


def _resolve(name: HubName, say: Say) -> tuple[str, bool]:
    """The commit of a name, and whether the hub may be asked for its files."""
    if name.pinned:
        return name.revision, not client.is_offline()
    cached = client.cached_commit(name)
    if client.is_offline():
        if cached is None:
            raise VtpError(_not_cached(name))
        return cached, False
    try:
        return client.commit_of(name), True
    except Unreached as error:
        if cached is None:
            raise
        say(f"the hub was not reached, so the cache's {name.repo}@{cached[:12]} is used ({error.why})")
        return cached, False


def _not_cached(name: HubName) -> str:
    why, cure = "the hub was not reached", "check the network"
    if client.is_offline():
        why, cure = "HF_HUB_OFFLINE forbids to fetch it", "unset that"
    return (
        f"no such folder, and the hub's cache does not have all of {name}, while {why}; {cure}, or give a "
        "folder"
    )


def _remember(name: HubName, commit: str) -> None:
    """Note the commit of a revision as the hub's library does, for when the hub is not reached."""
    note = repo_folder(client.cache(), name) / "refs" / name.revision
    if client.cached_commit(name) == commit:
        return
    with suppress(OSError, VtpError):  # a cache that others filled may be read-only
        note.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(note) as aside:
            aside.write_text(commit, encoding="ascii")


# -- fetching ------------------------------------------------------------------------------------------------


def _bring(name: HubName, folder: Path, asked: bool, say: Say) -> None:
    """Fetch a bundle of a commit and put it in its place, once it is whole and what its manifest says."""
    manifest_file = _manifest_file(name, asked)
    try:
        manifest = parse_manifest(read_bounded(manifest_file, FILE_BYTES))
        check_names(manifest)
    except VtpError as error:
        raise VtpError(f"{_short(name)} on the hub: {error}") from error
    files = {MANIFEST: manifest_file, **_download_all(name, manifest, asked, say)}
    with whole_folder(folder) as aside:
        for path, source in files.items():
            _place(source, aside / path)
        try:
            open_bundle(aside, check_hashes=True)
        except VtpError as error:
            raise VtpError(
                f"{_short(name)} on the hub is not used: {error}; if it was damaged on its way, remove it "
                f"with: {command_line('hf', 'cache', 'rm', f'model/{name.repo}')}"
            ) from error


def _manifest_file(name: HubName, asked: bool) -> Path:
    cached = client.cached_file(name, MANIFEST)
    if cached is not None:
        return cached
    if not asked:
        raise VtpError(_not_cached(name))
    found = client.describe(name, [MANIFEST, "config.json", "vtp.json"])
    if MANIFEST not in found:
        raise VtpError(_no_bundle(name, found))
    if found[MANIFEST].bytes > FILE_BYTES:
        raise VtpError(
            f"{MANIFEST} of {_short(name)} on the hub has {found[MANIFEST].bytes} bytes; at most "
            f"{FILE_BYTES} are read of one"
        )
    return client.download(name, MANIFEST)


def _no_bundle(name: HubName, found: Mapping[str, RemoteFile]) -> str:
    if "vtp.json" in found:
        return (
            f"{name.repo} on the hub is laid out for transformers.js, not a bundle; its README.md says how "
            "it is loaded"
        )
    if "config.json" in found:
        made = f"{name.name}-bundle"
        return (
            f"{name.repo} on the hub is a model checkpoint (it has config.json), not a bundle; make one of "
            f"it with: {command_line('vtp-export', '--model', name.repo, '-o', made)}"
        )
    return f"{_short(name)} on the hub is not a bundle: it has no {MANIFEST}"


def check_names(manifest: Manifest) -> None:
    """Refuse names that no file of a bundle has: folders, engines, scripts, hidden files."""
    if len(manifest.files) > _MOST_FILES:
        raise VtpError(f"its manifest names {len(manifest.files)} files; at most {_MOST_FILES} are fetched")
    for path in manifest.files:
        if path != TOKENIZER and not _GRAPH_FILE.fullmatch(path):
            raise VtpError(
                f"its manifest names the file '{shown(path, 60)}', which is neither a graph (.onnx), its "
                f"weights (.onnx.data) nor {TOKENIZER}; do not use this bundle"
            )
    if len({path.lower() for path in manifest.files}) < len(manifest.files):
        raise VtpError("its manifest names two files that differ in capitals alone; do not use this bundle")
    wrong = next((path for path, info in manifest.files.items() if info.bytes < 0), None)
    if wrong is not None:
        raise VtpError(f"its manifest gives {wrong} a size below 0; do not use this bundle")


def _download_all(name: HubName, manifest: Manifest, asked: bool, say: Say) -> dict[str, Path]:
    """Every file that the manifest names, in the cache; nothing is fetched before all sizes are known."""
    have = {path: client.cached_file(name, path) for path in manifest.files}
    lacking = {path: manifest.files[path] for path, file in have.items() if file is None}
    if lacking and not asked:
        raise VtpError(_not_cached(name))
    if lacking:
        _check_sizes(name, lacking, client.describe(name, list(lacking)))
        total = _to_fetch(name, lacking)
        _check_room(name, total)
        say(f"{_short(name)} on the hub: {len(lacking)} files, {size_of(total)} to fetch")
    return {path: file or client.download(name, path) for path, file in have.items()}


def _check_sizes(name: HubName, wanted: Mapping[str, FileInfo], found: Mapping[str, RemoteFile]) -> None:
    """Refuse files that the hub does not have, or has in another size or with another sha256."""
    for path, info in wanted.items():
        if path not in found:
            raise VtpError(f"{_short(name)} on the hub lacks {path}, which its manifest names; push it again")
        remote = found[path]
        if remote.bytes != info.bytes or remote.sha256 not in (None, info.sha256):
            raise VtpError(
                f"{path} of {_short(name)} on the hub is not what its manifest says ({remote.bytes} bytes, "
                f"not {info.bytes}, or another sha256); do not use this bundle"
            )


def _to_fetch(name: HubName, wanted: Mapping[str, FileInfo]) -> int:
    """Bytes that are not in the cache under another commit, where large files lie by their sha256."""
    blobs = repo_folder(client.cache(), name) / "blobs"
    return sum(info.bytes for info in wanted.values() if not (blobs / info.sha256).exists())


def _check_room(name: HubName, total: int) -> None:
    """Refuse more than the limit, or than the disk of the cache has."""
    limit = _limit_gb()
    if total > limit * 1e9:
        raise VtpError(
            f"{_short(name)} on the hub has {size_of(total)} to fetch, and {_LIMIT} is {limit:g}; set it "
            "higher if you want that much"
        )
    folder = client.cache()
    free = free_disk(folder)
    if total + _SPARE > free:
        raise VtpError(
            f"{_short(name)} on the hub has {size_of(total)} to fetch, and {folder} has {size_of(free)} "
            "free; free some space, or set HF_HOME to another disk"
        )


def _limit_gb() -> float:
    text = os.environ.get(_LIMIT, "")
    try:
        value = float(text) if text else _LIMIT_GB
    except ValueError:
        value = -1.0
    if not value > 0:
        raise VtpError(f"{_LIMIT}='{shown(text, 40)}' is not a number of gigabytes above 0; set another")
    return value


def _place(source: Path, target: Path) -> None:
    """The file itself under another name, or a copy where the disk does not give it two."""
    real = source.resolve(strict=True)
    if not real.is_relative_to(client.cache().resolve()):
        raise VtpError(f"{source} is a link that leaves the hub's cache; remove it")
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def _short(name: HubName) -> str:
    return f"{name.repo}@{name.revision[:12]}"


def size_of(count: int) -> str:
    """Bytes in words."""
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
