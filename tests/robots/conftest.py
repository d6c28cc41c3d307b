"""What tests of robots share: a bundle of the built-in model, pictures about which it answers differently."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtp import Pipeline

from ..once import Once
from .processes import ROOT, Peer, peer, raw, write_pictures

WIDTH, HEIGHT = 640, 480
EXAMPLES = ("scene", "scene2", "scene3", "scene4")


@pytest.fixture(scope="module")
def bundle(once: Once) -> Path:
    from vtp.export.exporter import Request, export

    wishes = {"method": "adaptprune", "keep_tokens": "16,57", "verify": "none"}
    return once.folder("ros/bundle", lambda part: export(Request(part, **wishes)))


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def scenes() -> list[np.ndarray]:
    """640x480 pictures about which the question has different answers."""
    files = [Image.open(ROOT / "scenes" / "examples" / f"{name}.png") for name in EXAMPLES]
    return [np.asarray(file.convert("RGB").resize((WIDTH, HEIGHT))) for file in files]


@pytest.fixture(scope="module")
def pictures(scenes: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "rgb8.json"
    return write_pictures(path, [raw("rgb8", scene) for scene in scenes])


@pytest.fixture
def talk() -> Iterator[Peer]:
    with peer() as other:
        yield other
