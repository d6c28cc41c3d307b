"""A bundle on disk: opened and verified, or written whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vtp.engines import UsageError, VtpError
from vtp.engines.disk.files import is_file, read_bounded, sha256
from vtp.engines.disk.whole import recover, try_writing, undisturbed, whole_file, whole_folder
from vtp.engines.errors import shown
from vtp.engines.graph.check import check_graph
from vtp.engines.strict_json import FILE_BYTES, read_json
from vtp.runtime.bundle.manifest import FileInfo, Manifest, parse_manifest
from vtp.runtime.hub.names import is_repo, origin_of
from vtp.runtime.shell import command_line

MANIFEST = "manifest.json"
_OURS = {"schema", "stages", "graphs", "files"}  # of a manifest of any version
_OLD_ENGINES = "engines"
# What `hf download --local-dir` lays beside a bundle: nothing of it is read.
_OF_THE_HUB = ("README.md", ".gitattributes", ".cache", ".cache/huggingface")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder and its manifest."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.folder / name

    @property
    def origin(self) -> str | None:
        """Of a bundle of the hub "org/name@commit", with all 40 digits; None for any other."""
        name = origin_of(self.folder)
        return None if name is None else str(name)

    @property
    def stated_origin(self) -> dict[str, str]:
        """The origin as JSON objects of commands have it; {}: none."""
        return {} if self.origin is None else {"origin": self.origin}

    @property
    def given(self) -> str:
        """What names this bundle on a command line: its origin, or its folder."""
        return self.origin or str(self.folder)


@undisturbed
def open_bundle(folder: Path, check_hashes: bool = False) -> Bundle:
    """Open a bundle: the manifest's schema, and every file's place and size, and what graphs read.

    With `check_hashes` every file's sha256 as well, and that no other file lies there.

    Raises VtpError, in one line, for what is not a bundle or no longer the one that was exported.
    """
    if not folder.is_dir():
        make = command_line("vtp-export", "-o", folder)
        hub = f", or give hf://{folder} if the hub's is meant" if is_repo(str(folder)) else ""
        raise VtpError(f"no bundle at {folder}: no such folder; make one with: {make}{hub}")
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise VtpError(
            f"{folder} is not a bundle: it has no {MANIFEST}; make one with: vtp-export --model MODEL -o DIR"
        )
    manifest = parse_manifest(read_bounded(manifest_path, FILE_BYTES, within=folder))
    for name, info in manifest.files.items():
        _check_file(folder, name, info, check_hashes)
    if check_hashes:
        _refuse_others(folder, manifest)
    for name in manifest.graphs:
        check_graph(folder / name, _beside_graph(name, manifest))
    return Bundle(folder, manifest)


def _check_file(folder: Path, name: str, info: FileInfo, check_hash: bool) -> None:
    if not is_inside(name):
        raise VtpError(f"the manifest names the path '{name}', which leaves the bundle; refuse this bundle")
    path = folder / name
    if not is_file(path):
        raise VtpError(f"{folder} lacks the file {shown(name)}; copy it again or export the bundle again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise VtpError(f"{name} is a link that leaves the bundle; refuse this bundle")
    size = path.stat().st_size
    if size != info.bytes:
        raise VtpError(
            f"{name} has {size} bytes where the manifest says {info.bytes}: truncated or changed; "
            "copy it again or export the bundle again"
        )
    if check_hash and sha256(path) != info.sha256:
        raise VtpError(f"{name} does not have the manifest's sha256: it was changed; export the bundle again")


def _refuse_others(folder: Path, manifest: Manifest) -> None:
    """Refuse what lies in the folder and nobody vouches for."""
    known = {MANIFEST, *manifest.files, *_OF_THE_HUB} | {
        str(parent) for name in manifest.files for parent in PurePosixPath(name).parents
    }
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and not name.startswith(".cache/huggingface/"):
            raise VtpError(f"{folder} holds {name}, which its manifest does not name: move it elsewhere")


def _beside_graph(file: str, manifest: Manifest) -> dict[str, int]:
    """The files that a graph may read weights from, by the names that it may give them: plain ones."""
    paths = {PurePosixPath(name): info.bytes for name, info in manifest.files.items()}
    return {path.name: size for path, size in paths.items() if path.parent == PurePosixPath(file).parent}


def is_inside(name: str) -> bool:
    """Whether a file name of a manifest stays within the bundle, on any operating system."""
    parts = PurePosixPath(name).parts
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    windows = PureWindowsPath(name)
    return bool(parts) and not absolute and not windows.anchor and ".." not in (*parts, *windows.parts)


def set_calibration(
    folder: Path, keep: int, calibration: dict[str, Any], measured: Manifest | None = None
) -> Manifest:
    """Make `keep` the default keep-count of a bundle and note how it was found; returns the new manifest.

    The manifest is replaced whole; no graph changes. `measured` is the manifest of what was calibrated.
    Raises VtpError where the folder cannot be written, or holds another bundle by now; UsageError for one in
    the hub's cache, which stays what its commit says.
    """
    check_own(open_bundle(folder))
    with whole_file(folder / MANIFEST, beside=_beside(folder)) as aside:
        manifest = open_bundle(folder).manifest  # of the folder that is held now
        if measured is not None and measured.files != manifest.files:
            raise VtpError(f"{folder} was replaced while it was calibrated; calibrate the new bundle")
        visual = dataclasses.replace(manifest.visual, default_keep=keep)
        changed = dataclasses.replace(manifest, visual=visual, calibration=calibration)
        parse_manifest(changed.to_json())  # what the next reader would refuse is never written
        aside.write_text(changed.to_json(), encoding="utf-8")
    return changed


def check_own(bundle: Bundle) -> None:
    """Refuse to change a bundle of the hub's cache, which is of a commit."""
    if bundle.origin is not None:
        repo = bundle.origin.partition("@")[0]
        copy = command_line("hf", "download", repo, "--local-dir", repo.partition("/")[2])
        raise UsageError(
            f"{bundle.origin} lies in the hub's cache, where bundles are not changed; copy it with: {copy}"
        )


def _beside(folder: Path) -> Path:
    """Where a new manifest is written: beside the bundle, which a kill then leaves without a stray file."""
    parent = folder.resolve().parent
    same_disk = folder.exists() and folder.stat().st_dev == parent.stat().st_dev
    return parent if same_disk and os.access(parent, os.W_OK) else folder


def describe_files(folder: Path) -> dict[str, FileInfo]:
    """FileInfo of every file in a folder except the manifest, by name."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    return {name: FileInfo(sha256(folder / name), (folder / name).stat().st_size) for name in names}


def check_outside(output: Path) -> None:
    """Refuse a file or folder to be written within a bundle, whose manifest would not name it."""
    for folder in output.resolve().parents:
        if _is_bundle(folder):
            raise UsageError(
                f"output {output} lies in the bundle {folder}, which holds its own files only; choose a path "
                "elsewhere"
            )


def _is_bundle(folder: Path) -> bool:
    try:
        parse_manifest(read_bounded(folder / MANIFEST, FILE_BYTES, within=folder))
    except (OSError, VtpError):  # no manifest.json, or another program's
        return False
    return True


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists without --overwrite, or that is not a bundle to overwrite."""
    try:
        check_outside(folder)
        recover(folder.resolve())
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"output {folder} is a file; choose a folder that does not exist")
        if Path.cwd().is_relative_to(folder.resolve()):
            raise UsageError(f"output {folder} holds the folder you are in; choose another one")
        try_writing(folder)
        if not folder.exists() or not any(folder.iterdir()):
            return
    except OSError as error:
        raise UsageError(f"output {folder} cannot be used: {error.strerror or error}") from error
    if not overwrite:
        raise UsageError(f"output {folder} exists; choose another folder or add --overwrite")
    _check_is_only_a_bundle(folder)


def _check_is_only_a_bundle(folder: Path) -> None:
    """Refuse to overwrite a folder that another program made, or that holds somebody's own files as well.

    Browser extensions and web apps have a manifest.json, too. A bundle of an older or newer version counts as
    one, and so does the folder `engines` that older versions of vtp-build put into bundles.
    """
    try:
        data = read_json(folder / MANIFEST)
    except VtpError:
        data = None
    if not isinstance(data, dict) or not set(data) >= _OURS or not isinstance(data["files"], dict):
        raise UsageError(
            f"output {folder} is not a bundle, so --overwrite leaves it alone; choose another folder"
        )
    known = {MANIFEST, _OLD_ENGINES, *data["files"]}
    others = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if others:
        raise UsageError(
            f"output {folder} holds {shown(others[0])}, which is not of the bundle, so --overwrite leaves it "
            "alone; move that file away, or choose another folder"
        )


@contextmanager
def whole_bundle(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a bundle aside and swap it in at the end: it appears whole or not at all.

    Yields the folder to write to, on the same disk. When the body raises (or the process is killed, or the
    power goes), the output is as it was before; leftovers of a killed run are hidden folders
    `.<name>.partial-*`, removed by the next run for the same output.
    """
    with whole_folder(folder, lambda: check_output(folder, overwrite)) as aside:
        yield aside
