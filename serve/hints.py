"""What is said at the start about a bundle that is none, and about slots that do not fit into memory."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from vtp.engines import AUTO, VtpError, capabilities, engine_names
from vtp.engines.disk.files import read_bounded
from vtp.engines.errors import shown
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.bundle.manifest import Manifest, parse_manifest
from vtp.runtime.bundle.memory import cache_bytes
from vtp.runtime.machine.room import Room
from vtp.runtime.shell import command_line

__all__ = ["check_is_bundle", "manifest_of", "slots_note"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MANIFEST_BYTES = 64 << 20
_MOST = 1000  # entries of a folder that are looked at


def check_is_bundle(path: str | Path) -> None:
    """VtpError for what is not a bundle: what was found instead, and the command that makes one of it."""
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return
    if (folder / "config.json").is_file():
        made = _bundle_name(folder.resolve())
        raise VtpError(
            f"{shown(path)} is a checkpoint of Hugging Face (it has config.json), not a bundle; make one of "
            f"it with: {command_line('vtp-export', '--model', folder, '-o', made)}, then: vtp-serve {made}"
        )
    if folder.is_file():
        raise VtpError(f"{shown(path)} is a file; a bundle is a folder: give the one that vtp-export -o made")
    if not folder.exists():
        raise VtpError(_absent(str(path), folder))
    raise VtpError(
        f"{shown(path)} is not a bundle: it has no {MANIFEST}; make one with: vtp-export --model MODEL -o DIR"
    )


def _absent(given: str, folder: Path) -> str:
    if near := get_close_matches(folder.name, _bundles(folder.parent), n=1, cutoff=0.5):
        return f"there is no bundle {shown(given)}; did you mean {shown(folder.parent / near[0])}?"
    if _HUB_ID.fullmatch(given):
        made = _bundle_name(folder)
        return (
            f"there is no folder {shown(given)}; if it is a model of the Hugging Face hub, make a bundle of "
            f"it with: {command_line('vtp-export', '--model', given, '-o', made)}, then: vtp-serve {made}; "
            f"a bundle of the hub is hf://{shown(given)}"
        )
    return (
        f"there is no bundle {shown(given)}, and no such folder; make one with: "
        f"{command_line('vtp-export', '-o', folder)}"
    )


def _bundles(folder: Path) -> list[str]:
    """The names of the bundles in a folder."""
    try:
        names = [one.name for one, _ in zip(folder.iterdir(), range(_MOST), strict=False)]
    except OSError:
        return []
    return [name for name in names if (folder / name / MANIFEST).is_file()]


def _bundle_name(folder: Path) -> str:
    return f"{folder.name or 'model'}-bundle"


def manifest_of(path: str | Path) -> Manifest:
    """A bundle's manifest, without looking at its other files. VtpError."""
    folder = Path(path)
    return parse_manifest(read_bounded(folder / MANIFEST, _MANIFEST_BYTES, within=folder))


def slots_note(manifest: Manifest, slots: int, engine: str, room: Room | None) -> str | None:
    """A line where the caches of all slots do not fit into memory; None where they do, or on a GPU.

    engine  as it was asked for
    room    how much may still be taken, before the bundle is loaded
    """
    one = sum(map(cache_bytes, manifest.graphs.values()))
    if room is None or one * slots <= room.bytes or not _may_be_on_cpu(engine):
        return None
    fit = max(1, room.bytes // one)
    return (
        f"--slots {slots} may take {_mb(one * slots)} MB for {slots} caches of {_mb(one)} MB, and "
        f"{room.limit} is {_mb(room.bytes)} MB: give --slots {fit}, or export with a --max-length below "
        f"{manifest.model.max_length}"
    )


def _may_be_on_cpu(engine: str) -> bool:
    return engine == AUTO or engine not in engine_names() or capabilities(engine).on_cpu


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 10e6 else f"{count / 1e6:,.1f}"
