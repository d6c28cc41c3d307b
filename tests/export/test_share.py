"""--share tile: K dealt to the tiles of a picture, and a method that chooses in each of them for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vtp.engines import UsageError
from vtp.export import cli
from vtp.export.families.llava.tiles import Views
from vtp.export.families.tiles import Tile, equal_tiles
from vtp.export.plan.share import Shared, dealt
from vtp.export.pruners import find_method
from vtp.export.request import Request
from vtp.runtime import Pipeline

from ..models.tiny_families import save_anyres
from ..models.tiny_split import save_idefics3, save_internvl
from ..oracles import numpy_merging
from ..oracles.numpy_pruners_more import REFERENCES

TILES = [
    Tile(range(12), (3, 4)),
    Tile([12, 13, 14, 18, 19, 20, 24, 25, 26], (3, 3)),  # side by side in one grid of lines of six
    Tile([15, 16, 17, 21, 22, 23, 27, 28, 29], (3, 3)),
]
COUNT = 30


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_shares_are_proportional_whole_numbers(data: st.DataObject, sizes: list[int]) -> None:
    """Within one of the exact quota, the rest to the largest remainders; none gets nothing or too much."""
    total = sum(sizes)
    keep = data.draw(st.integers(len(sizes), total))
    shares = dealt(sizes, keep)
    assert sum(shares) == keep and all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
    quotas = [Fraction(keep * size, total) for size in sizes]
    if all(quota >= 1 for quota in quotas):
        assert all(int(quota) <= share <= int(quota) + 1 for share, quota in zip(shares, quotas, strict=True))
        rests = [quota - int(quota) for quota in quotas]
        up = [rest for rest, share, quota in zip(rests, shares, quotas, strict=True) if share > int(quota)]
        down = [rest for rest, share, quota in zip(rests, shares, quotas, strict=True) if share == int(quota)]
        assert not up or not down or min(up) >= max(down)


def test_remainders_go_to_the_first_of_equal_tiles_and_none_starves() -> None:
    assert dealt([576, 576, 576, 576, 576], 64) == [13, 13, 13, 13, 12]
    assert dealt([576, 24], 64) == [61, 3]
    assert dealt([576, 4, 4], 64) == [62, 1, 1]
    with pytest.raises(UsageError, match="keep-tokens 4 is fewer than the 5 tiles of a picture"):
        dealt([4] * 5, 4)


def cues_of(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image_features": rng.normal(size=(2, count, 8)).astype(np.float32),
        "image_embeds": rng.normal(size=(2, count, 8)).astype(np.float32),
        "attention_scores": rng.permutation(2 * count).reshape(2, count).astype(np.float32) / 128,
        "vision_keys": rng.normal(size=(2, count, 8)).astype(np.float32),
    }


@pytest.mark.parametrize("name", ["fastervlm", "divprune", "scope", "vispruner", "otprune", "holov"])
@pytest.mark.parametrize("keep", [3, 11, 30])
def test_a_method_chooses_as_its_loops_do_in_each_tile(name: str, keep: int) -> None:
    method = find_method(name)
    module, cues = Shared(method, TILES, keep, {}), cues_of(COUNT, seed=keep)
    found = module(**{cue: torch.from_numpy(cues[cue]) for cue in method.needs})
    for picture in range(2):
        wanted: list[int] = []
        for tile, share in zip(TILES, dealt([12, 9, 9], keep), strict=True):
            places = list(tile.places)
            own = {cue: cues[cue][picture][places] for cue in method.needs}
            indices, _ = REFERENCES[name](tile.grid, share, **own)
            wanted += [places[index] for index in indices]
        assert found[picture].tolist() == sorted(wanted)


def test_rows_that_were_merged_come_with_their_tokens() -> None:
    method = find_method("prumerge")
    module, cues = Shared(method, TILES, 12, {}), cues_of(COUNT, seed=5)
    keep, rows = module(**{cue: torch.from_numpy(cues[cue]) for cue in method.needs})
    for picture in range(2):
        wanted: dict[int, np.ndarray] = {}
        for tile, share in zip(TILES, dealt([12, 9, 9], 12), strict=True):
            places = list(tile.places)
            own = {cue: cues[cue][picture][places] for cue in method.needs}
            indices, _, merged = numpy_merging.REFERENCES["prumerge"](tile.grid, share, **own)
            wanted.update(zip((places[index] for index in indices), merged, strict=True))
        assert keep[picture].tolist() == sorted(wanted)
        np.testing.assert_allclose(rows[picture], [wanted[place] for place in sorted(wanted)], atol=2e-5)


@pytest.mark.parametrize(
    ("tiles", "size"), [((2, 2), (56, 56)), ((2, 2), (40, 56)), ((1, 3), (28, 84)), ((2, 1), (90, 31))]
)
def test_parts_of_llava_next_hold_the_patches_of_their_view(tiles, size) -> None:
    """Which view a patch comes from is known from its order, which other tests hold against transformers."""
    views = Views(4, tiles, size)
    of = (views.order() // 16).tolist()
    found = views.parts()
    assert sorted(place for tile in found for place in tile.places) == list(range(len(of)))
    for tile in found:
        assert len({of[place] for place in tile.places}) == 1
        assert list(tile.places) == sorted(tile.places) and len(tile.places) == tile.grid[0] * tile.grid[1]
    assert len(found) == len(set(of))
    assert equal_tiles(1, (4, 4)) == [] and [tile.places[0] for tile in equal_tiles(3, (2, 2))] == [0, 4, 8]


BUNDLES: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "idefics3": (save_idefics3, (), {"image_size": (56, 56), "method": "fastervlm", "keep_tokens": "9"}),
    "grid": (save_idefics3, (), {"image_size": (56, 56), "method": "hiprune", "keep_tokens": "9"}),
    "internvl": (save_internvl, (), {"image_size": (28, 56), "method": "vispruner", "keep_tokens": "7"}),
    "next": (
        save_anyres,
        ("llava_next",),
        {"image_size": (40, 56), "method": "prumerge", "keep_tokens": "12"},
    ),
    "next-restored": (
        save_anyres,
        ("llava_next",),
        {"image_size": (40, 56), "method": "cdpruner", "keep_tokens": "12", "restore": True},
    ),
    "jetpack6": (
        save_anyres,
        ("llava_next",),
        {"image_size": (40, 56), "method": "divprune", "keep_tokens": "9", "target": "jetpack6"},
    ),
}
QUICK = {"idefics3"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BUNDLES]
)
def test_every_tile_of_a_picture_keeps_its_share(once, saved, name) -> None:
    """Verified against torch, and counted in an answer about a picture of which one tile alone shows much."""
    save, kind, wishes = BUNDLES[name]
    folder = saved(save, *kind)[0]
    bundle = once.bundle(folder, share="tile", max_length=256, **wishes)
    height, width = wishes["image_size"]
    picture = np.full((height, width, 3), 128, np.uint8)
    picture[: height // 3, : width // 3] = np.random.default_rng(0).integers(
        0, 256, (height // 3, width // 3, 3)
    )
    with Pipeline.load(bundle, "ort-cpu", 1) as pipe:
        manifest = pipe.manifest
        assert manifest.method.share == "tile" and manifest.method.name == wishes["method"]
        for keep in manifest.visual.keep:
            kept = pipe.generate(Image.fromarray(picture), "what ?", keep_tokens=keep, max_new_tokens=2).kept
            assert len(kept) == keep
            if name in ("idefics3", "grid"):  # four tiles and the whole, equally large
                per_tile = Counter(place // (manifest.visual.count // 5) for place in kept)
                assert [per_tile[tile] for tile in range(5)] == dealt([4] * 5, keep)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--share", "row"], "unknown share 'row'; choose one of picture, tile, frame"),
        (["--method", "none", "--restore"], "method none keeps all of them"),
        (["--layout", "transformers.js", "--method", "vispruner", "--restore"], "no place for --restore"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(tmp_path: Path, capsys, flags, problem) -> None:
    assert cli.main([*flags, "-o", str(tmp_path / "bundle")]) == 2
    told = capsys.readouterr().err
    assert problem in told and told.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "wishes", "problem"),
    [
        ("gqa", {}, "--share tile needs pictures in tiles, and here family llava looks at one in one piece"),
        (
            "idefics3",
            {"method": "fastv"},
            "method fastv acts at decoder:2, where it weighs all tokens together",
        ),
        ("idefics3", {"keep_tokens": "4"}, "keep-tokens 4 is fewer than the 5 tiles of a picture"),
        ("idefics3", {"method": "none", "keep_tokens": None}, "method none keeps all of them"),
        ("idefics3", {"share": "row"}, "unknown share 'row'; choose one of picture, tile, frame"),
        ("idefics3", {"share": "frame"}, "and here family idefics3 has pictures; leave it out"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, saved, model_folder, model, wishes, problem
) -> None:
    from vtp.export.exporter import export

    folder = model_folder("gqa") if model == "gqa" else saved(save_idefics3)[0]
    size = {} if model == "gqa" else {"image_size": (56, 56)}
    asked = {"method": "fastervlm", "keep_tokens": "6", "share": "tile", **size, **wishes}
    with pytest.raises(UsageError, match=problem):
        export(Request(tmp_path / "bundle", model=str(folder), **asked))
    assert not (tmp_path / "bundle").exists()
