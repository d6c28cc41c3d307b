"""Random numbers for bundles that were packed without weights, the same for a bundle and for PyTorch.

Every tensor is drawn by its name, the large ones on the device itself: scales of norms are one, everything
else is normal with standard deviation 0.02, in float16. So a model of 14 GB needs no download, and both sides
of a comparison hold the same numbers. What such a model says means nothing.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtp.bench.shapes.weight_map import (
    SCALE,
    Piece,
    draw_small,
    is_small,
    read_weight_map,
    seed_of,
    write_manifest,
)
from vtp.engines import VtpError
from vtp.engines.disk.files import read_bounded, sha256
from vtp.engines.disk.whole import whole_file
from vtp.engines.strict_json import FILE_BYTES
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.bundle.manifest import FileInfo, parse_manifest

_BYTES = 2  # of a float16


def draw(name: str, shape: Sequence[int], device: str) -> Any:
    """The tensor of that name, float16, on a torch device ("cuda" or "cpu": numbers of large ones differ)."""
    import torch

    if is_small(shape):
        return torch.from_numpy(draw_small(name, shape)).to(device)
    empty = torch.empty(tuple(shape), dtype=torch.float16, device=device)
    generator = torch.Generator(device).manual_seed(seed_of(name))
    return empty.normal_(0.0, SCALE, generator=generator)


def fill_model(model: Any, device: str) -> None:
    """Draw every parameter of a torch model in place, by its name in the state_dict; a tied one once."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(draw(name, parameter.shape, device))


def fill_bundles(folders: Iterable[Path], device: str) -> dict[str, int]:
    """Write the data files that the bundles' weight maps ask for; files of equal content are one on the disk.

    What lies there with the right size is left alone. The bundles' manifests list the files afterwards.
    Returns the bytes of `written` and `linked` files.
    Raises VtpError where the disk has no room, or a folder no weight map.
    """
    made: dict[tuple[Piece, ...], Path] = {}
    found = {"written": 0, "linked": 0}
    for folder in folders:
        for file, pieces in read_weight_map(folder).items():
            path, content = folder / file, tuple(pieces)
            if not _is_whole(path, pieces):
                if content in made:
                    path.unlink(missing_ok=True)
                    os.link(made[content], path)
                    found["linked"] += size_of(pieces)
                else:
                    _write(path, pieces, device)
                    found["written"] += size_of(pieces)
            made.setdefault(content, path)
        _list_files(folder)
    return found


def _list_files(folder: Path) -> None:
    """Enter data files in a bundle's manifest: graphs read weights from files that it lists, no others."""
    manifest = parse_manifest(read_bounded(folder / MANIFEST, FILE_BYTES, within=folder))
    missing = [file for file in read_weight_map(folder) if file not in manifest.files]
    if missing:
        infos = {file: FileInfo(sha256(folder / file), (folder / file).stat().st_size) for file in missing}
        write_manifest(folder, replace(manifest, files={**manifest.files, **infos}))


def size_of(pieces: Sequence[Piece]) -> int:
    """Bytes of a data file."""
    return max(piece.offset + _BYTES * math.prod(piece.shape) for piece in pieces)


def _is_whole(path: Path, pieces: Sequence[Piece]) -> bool:
    return path.is_file() and path.stat().st_size == size_of(pieces)


def _write(path: Path, pieces: Sequence[Piece], device: str) -> None:
    free, need = shutil.disk_usage(path.parent).free, size_of(pieces)
    if need > free:
        raise VtpError(f"{path} takes {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free there")
    with whole_file(path) as aside, aside.open("wb") as out:
        for piece in pieces:
            values = draw(piece.name, piece.shape, device)
            out.seek(piece.offset)
            out.write((values.T if piece.transposed else values).contiguous().cpu().numpy())
