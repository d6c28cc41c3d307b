"""What belongs into the data files of a bundle that was exported without weights; needs only numpy."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vtp.engines import VtpError
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.bundle.manifest import Manifest

WEIGHT_MAP = "weights.json"
SMALL = 1 << 16  # elements: up to there an exporter may look at numbers, to fold or to share them
SCALE = 0.02
MODEL = "model.json"  # the model's config.json, under a name that no reader of bundles takes for its own


@dataclass(frozen=True)
class Piece:
    """One tensor of a data file: the model's `name` for it, its `shape` there, and its place in the file."""

    file: str
    offset: int
    name: str
    shape: tuple[int, ...]
    transposed: bool


def write_weight_map(folder: Path, pieces: Sequence[Piece]) -> None:
    """Write the weight map of a bundle's folder."""
    (folder / WEIGHT_MAP).write_text(json.dumps([asdict(piece) for piece in pieces]), encoding="utf-8")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle whose data files came or went."""
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def read_weight_map(folder: Path) -> dict[str, list[Piece]]:
    """File -> what belongs into it, in order. Raises VtpError where the folder has no weight map."""
    try:
        entries = json.loads((folder / WEIGHT_MAP).read_text(encoding="utf-8"))
        pieces = [Piece(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VtpError(
            f"{folder} has no readable {WEIGHT_MAP}; make it with: python -m vtp.bench.gpu.pack"
        ) from error
    return {
        file: [one for one in pieces if one.file == file] for file in sorted({one.file for one in pieces})
    }


def is_small(shape: Sequence[int]) -> bool:
    """Whether a tensor's numbers are known from the export on (see `draw_small`)."""
    return math.prod(shape) <= SMALL


def draw_small(name: str, shape: Sequence[int]) -> np.ndarray:
    """The numbers of a small tensor, float16, by its name: scales of norms are one, all else is normal."""
    if is_scale(name, shape):
        return np.ones(tuple(shape), np.float16)
    return np.random.default_rng(seed_of(name)).normal(0.0, SCALE, tuple(shape)).astype(np.float16)


def is_scale(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the scale of a norm."""
    return len(shape) == 1 and name.endswith("weight")


def seed_of(name: str) -> int:
    """The seed of a tensor's numbers."""
    return zlib.crc32(name.encode())
