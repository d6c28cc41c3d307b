"""LFM2-VL's tiles: grids, pixels and the picture as a whole are those of transformers' own processor."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.preprocess import preprocess, source_boxes, spec_from_json, spec_to_json
from vtp.runtime.preprocess.fit import Layout
from vtp.runtime.preprocess.naflex import NaflexSpec, NaflexTilesSpec
from vtp.runtime.preprocess.pixels import paste

from ...models.tiny_lfm2 import unpadded
from ...stand_ins.torch_resizing import lfm2_image_processor

SMALL: dict[str, Any] = {
    "encoder_patch_size": 4,
    "tile_size": 32,
    "min_image_tokens": 4,
    "max_image_tokens": 24,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.7],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "small": SMALL,
    "few": {**SMALL, "min_tiles": 3, "max_tiles": 4, "max_pixels_tolerance": 0.5},
    "bare": {**SMALL, "use_thumbnail": False},
}
# Height and width of pictures: wide, tall, square, of exactly one tile, of whole tiles, odd.
SIZES = [(44, 88), (90, 31), (64, 64), (60, 61), (32, 32), (32, 96), (57, 203), (400, 31), (301, 299)]


def config_of(changes: dict[str, Any]) -> dict[str, Any]:
    """What a model folder says of its pictures."""
    own = json.loads(lfm2_image_processor(**changes).to_json_string())
    return {**own, "image_processor_type": "Lfm2VlImageProcessorFast"}


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_transformers(changes: dict[str, Any], image: Image.Image) -> Any:
    return lfm2_image_processor(**changes)(image, return_tensors="pt", return_row_col_info=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["small", "few", "bare"])
def test_pixels_and_views_are_transformers(name: str, size: tuple[int, int]) -> None:
    """Of every picture that the processor cuts; a bundle that refuses other layouts takes it."""
    image = picture(*size)
    theirs = by_transformers(SETTINGS[name], image)
    if len(theirs["pixel_values"]) > 1:
        check_same(config_of(SETTINGS[name]), image, theirs)
    else:
        assert kind_of(config_of(SETTINGS[name]), size) != NaflexTilesSpec.kind


@pytest.mark.parametrize("size", [(1024, 1024), (800, 1100), (513, 2100), (2100, 700)])
def test_pixels_of_published_settings(size: tuple[int, int]) -> None:
    image = picture(*size)
    check_same(config_of({}), image, by_transformers({}, image))


def kind_of(config: dict[str, Any], size: tuple[int, int]) -> str:
    """The kind of a bundle for an image size; "" where there is none."""
    try:
        return spec_from_processor(config, size).kind
    except UsageError:
        return ""


def check_same(config: dict[str, Any], image: Image.Image, theirs: Any) -> None:
    spec = spec_from_processor(config, (image.height, image.width), "refuse")
    assert isinstance(spec, NaflexTilesSpec) and spec_from_json(spec_to_json(spec)) == spec
    found, wanted = preprocess(image, spec), unpadded(theirs).numpy()
    assert found.dtype == np.float32 and found.shape == spec.shape and np.array_equal(found, wanted)
    assert np.array_equal(spec.view_grids, theirs["spatial_shapes"].numpy())
    assert spec.layout.grid == (int(theirs["image_rows"][0]), int(theirs["image_cols"][0]))
    assert spec.views == len(theirs["pixel_values"])


EDGES = st.one_of(st.integers(1, 60), st.integers(1, 4000))


@settings(max_examples=400, deadline=None)
@given(EDGES, EDGES, st.integers(1, 12), st.integers(2, 12), st.sampled_from([0.5, 2.0, 2.3]))
@example(80, 100, 2, 2, 0.5)  # equally near to two grids of as many tiles
@example(4000, 5000, 2, 2, 2.0)
@example(1, 4000, 2, 10, 2.0)
def test_layouts_are_transformers(height: int, width: int, least: int, most: int, tolerance: float) -> None:
    least = min(least, most)
    changes = {"min_tiles": least, "max_tiles": most, "max_pixels_tolerance": tolerance}
    theirs = lfm2_image_processor(**changes)
    rule = {"encoder_patch_size": 16, "downsample_factor": 2, "max_image_tokens": 256}
    large = theirs._is_image_too_large(height, width, max_pixels_tolerance=tolerance, **rule)
    columns, rows, *_ = theirs._get_grid_layout(height, width, least, most, 512)
    wide, high = theirs.smart_resize(height, width, min_image_tokens=64, **rule)
    spec = spec_from_processor(config_of(changes), (5000, 2500))
    assert isinstance(spec, NaflexTilesSpec)
    wanted = Layout((rows, columns), (512, 512), (high, wide))
    cut = large and (rows, columns) != (1, 1)
    assert spec.layout_of((height, width)) == (wanted if cut else None)


def test_other_shapes_are_padded_to_the_image_size_and_cut_as_transformers_would() -> None:
    spec = spec_from_processor(config_of(SMALL), (44, 88))
    assert isinstance(spec, NaflexTilesSpec) and spec.layout == Layout((1, 2), (32, 32), (24, 48))
    for size in [(60, 60), (31, 90), (200, 90), (7, 5)]:
        image = picture(*size)
        found = preprocess(image, spec)
        high, wide = max(size[0], round(size[1] / 2 + 0.01)), max(size[1], 2 * size[0])
        padded = paste(image, (high, wide), tuple(int(255 * mean) for mean in SMALL["image_mean"]))
        theirs = by_transformers(SMALL, padded)
        assert found.shape == spec.shape
        if theirs["image_rows"] == [1] and theirs["image_cols"] == [2]:  # not where it is small, or large
            assert np.array_equal(found, unpadded(theirs).numpy())
        parts = source_boxes(spec, size[1], size[0])
        assert len(parts) == 3 and parts[0].right == parts[1].left and parts[0][:2] == parts[2][:2]
    with pytest.raises(VtpError, match="a picture of 90x31 does not have the layout that this bundle"):
        preprocess(picture(31, 90), replace(spec, fit="refuse"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_size": 30}, "tiles of 30x30 are not squares of whole visual tokens; .* multiple of 8"),
        ({"tile_size": 0}, "tile_size is 0; it must be a positive number"),
        ({"min_tiles": 5, "max_tiles": 4}, "5 to 4 tiles do not fit; the most must be 2 to 64"),
        ({"max_tiles": 65}, "2 to 65 tiles do not fit"),
        ({"max_pixels_tolerance": "2"}, "max_pixels_tolerance is '2'; it must be a number"),
        ({"resample": 3}, "resample must be 2, not 3"),
        ({"do_image_splitting": False}, "image size 88x44 is not made of whole visual tokens"),
        ({"min_tiles": 1, "max_tiles": 1}, "image size 88x44 is not made of whole visual tokens"),
    ],
)
def test_what_is_not_served(change: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, VtpError), match=message):
        spec_from_processor({**config_of(SMALL), **change}, (44, 88))


def test_a_manifest_whose_size_is_not_cut_is_refused() -> None:
    section = spec_to_json(spec_from_processor(config_of(SMALL), (44, 88)))
    with pytest.raises(VtpError, match="image size 40x40 is shown in one piece, and kind naflex_tiles cuts"):
        spec_from_json({**section, "image_height": 40, "image_width": 40})
    with pytest.raises(VtpError, match="at most 89,478,485 pixels"):
        spec_from_json({**section, "height": 16000, "width": 16000})


def test_a_size_that_transformers_itself_fails_on_is_refused() -> None:
    """As a whole it has more patches than the processor fills views up to."""
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        by_transformers(SMALL, picture(400, 11))
    with pytest.raises(UsageError, match="image size 11x400 is too long and thin to be shown as a whole"):
        spec_from_processor(config_of(SMALL), (400, 11))


def test_sizes_of_one_piece_are_what_they_were() -> None:
    """By default, where asked for, and in the manifests of earlier versions."""
    for size in (None, (32, 48)):
        spec = spec_from_processor(config_of(SMALL), size)
        section = spec_to_json(spec)
        assert isinstance(spec, NaflexSpec) and "use_thumbnail" not in section
        assert spec_from_json(section) == spec and spec.view_tokens == (np.prod(spec.image_size) // 64,)
