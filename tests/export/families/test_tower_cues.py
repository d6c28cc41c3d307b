"""Every cue of every family's tower: what the exporter's encoder gives equals what the reference reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vtp.engines import UsageError
from vtp.export.checkpoint import loading
from vtp.export.checkpoint.weights import fill
from vtp.export.exporter import Request, export
from vtp.export.graphs.attention.operators import emitting
from vtp.export.tower_cues import SCORES, TOWER_CUES, block_of

from ...oracles.disagreeing import FAMILIES


@pytest.mark.parametrize("kind", FAMILIES)
def test_cues_of_every_block_equal_the_reference(kind: str, tmp_path: Path) -> None:
    FAMILIES[kind][0](tmp_path / "model")
    model = loading.load(tmp_path / "model", "float32")
    family = model.family
    fill(family.model)
    shape = family.patches or (family.views, 3, *family.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        with emitting(family.decoder.model, family.tower):
            given = dict(
                zip(("image_features", *TOWER_CUES), family.vision_encoder(TOWER_CUES)(pixels), strict=True)
            )
        parts = family.reference(family.model, model.image.image_size)
        with parts.eager():
            wanted = parts.vision(pixels, TOWER_CUES)
    assert set(wanted) == set(given)
    for name, cue in wanted.items():
        torch.testing.assert_close(given[name][..., : cue.shape[-1]], cue, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("blocks", "places"), [(23, (22, 22, 8, 5)), (24, (23, 23, 9, 6)), (1, (0, 0, 0, 0))]
)
def test_earlier_cues_come_from_llavas_sixth_and_ninth_block(blocks: int, places: tuple[int, ...]) -> None:
    assert tuple(block_of(cue, blocks) for cue in SCORES) == places
    assert block_of("vision_keys", blocks) == blocks - 1


def test_a_reduced_tower_refuses_what_it_cannot_give(tmp_path: Path, model_folder: Any) -> None:
    wish = Request(tmp_path / "bundle", str(model_folder("four")), "hiprune", "3", tower="tome:1")
    with pytest.raises(
        UsageError, match="middle_received, which a tower with fewer rows does not give"
    ) as why:
        export(wish)
    assert "\n" not in str(why.value) and not (tmp_path / "bundle").exists()
