"""The method of one's own in docs/examples: short, right, and a bundle like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.export import pruners
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.runtime.result import VisualTokens

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "contrast.py"
METHOD = f"{EXAMPLE}:Contrast"


def contrast(grid: tuple[int, int], keep: int, rows: np.ndarray, scores: np.ndarray) -> list[int]:
    """The same as loops over one picture."""
    height, width = grid
    units = [row / np.linalg.norm(row) for row in rows.astype(np.float64)]
    worth = []
    for y in range(height):
        for x in range(width):
            near = [
                units[b * width + a]
                for b in range(max(0, y - 1), min(height, y + 2))
                for a in range(max(0, x - 1), min(width, x + 2))
            ]
            mean = np.mean(near, axis=0)
            place = y * width + x
            worth.append(float(scores[place]) * (1 - units[place] @ mean / np.linalg.norm(mean)))
    return sorted(sorted(range(len(worth)), key=lambda place: (-worth[place], place))[:keep])


def test_the_example_is_short_and_contributing_shows_it() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 30
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "vtp-export --method docs/examples/contrast.py:Contrast" in guide


@pytest.mark.parametrize(("grid", "keep"), [((4, 4), 5), ((3, 7), 8), ((1, 6), 2), ((5, 3), 15)])
def test_the_example_chooses_as_its_loops_do(grid: tuple[int, int], keep: int) -> None:
    method = pruners.resolve_method(METHOD)
    assert method is not None
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, grid[0] * grid[1], 8), np.float32)
    scores = rng.random((3, grid[0] * grid[1]), np.float32)
    kept = method(grid, keep)(
        image_features=torch.from_numpy(rows), attention_scores=torch.from_numpy(scores)
    )
    assert kept.tolist() == [contrast(grid, keep, *given) for given in zip(rows, scores, strict=True)]


def test_the_example_is_exported_held_against_torch_and_runs(
    tmp_path: Path, model_folder: Callable[[str], Path], picture: Image.Image
) -> None:
    request = Request(
        tmp_path / "bundle", model=str(model_folder("mha")), method=METHOD, keep_tokens="3,6", max_length=128
    )
    bundle = export(request)
    assert request.verify == "full" and bundle.manifest.parity
    with Pipeline.load(bundle.folder) as pipeline:
        answer = pipeline.generate(picture, "what color is the star ?", max_new_tokens=2, keep_tokens=6)
    assert answer.visual_tokens == VisualTokens(before=16, after=6)
