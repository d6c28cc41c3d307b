"""Kinds that cut tiles or patches: transformers' bits on any picture, and one layout for a bundle."""

import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size

from vtp.engines.errors import VtpError
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.media.images import load_image
from vtp.runtime.preprocess import ImageSpec, preprocess, source_box, source_boxes

from .processor_kinds import (
    CASES,
    PICTURES,
    PLAIN,
    assert_same_bits,
    noise,
    own_size,
    saved,
    spec_for,
    theirs,
    theirs_of,
)


@pytest.mark.parametrize("size", PICTURES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_transformers_where_the_layout_is_its_own(name: str, size: tuple[int, int]) -> None:
    picture, spec = noise(*size), spec_for(name, own_size(name, *size))
    assert_same_bits(preprocess(picture, spec), theirs_of(name, picture), spec)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("name", CASES)
def test_every_mode_has_transformers_bits(name: str, mode: str) -> None:
    source = noise(150, 71).convert(mode)
    spec = spec_for(name, own_size(name, 150, 71))
    assert_same_bits(preprocess(load_image(source), spec), theirs_of(name, source), spec)


@pytest.mark.parametrize("size", PICTURES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", PLAIN)
def test_one_view_processors_equal_transformers(name: str, size: tuple[int, int]) -> None:
    spec = spec_from_processor(saved(PLAIN[name]))
    assert spec.kind == "clip"
    for picture in (noise(*size), noise(*size).convert("L"), noise(*size).convert("RGBA")):
        assert_same_bits(preprocess(load_image(picture), spec), theirs(PLAIN[name], picture), spec)


def transparent(width: int, height: int) -> dict[str, Image.Image]:
    """Pictures with hidden colours, as a caller may hand them over."""
    rgba = noise(width, height)
    rgba.putalpha(noise(width, height, 1).getchannel(0))
    gif, palette = BytesIO(), rgba.convert("RGB").quantize(9)
    palette.save(gif, "GIF", transparency=4)
    keyed = noise(width, height).convert("1").convert("L")
    keyed.info["transparency"] = 0
    return {
        **{mode: rgba.convert(mode) for mode in ("RGBA", "LA", "PA")},
        "GIF": Image.open(gif),
        "key": keyed,
    }


@pytest.mark.parametrize("form", ["RGBA", "LA", "PA", "GIF", "key"])
@pytest.mark.parametrize("name", [*CASES, *PLAIN])
def test_transparent_pictures_have_transformers_bits(name: str, form: str) -> None:
    """transformers gets the unconverted picture."""
    source = transparent(150, 71)[form]
    assert source.mode != "RGB"
    if name in CASES:
        spec = spec_for(name, own_size(name, 150, 71))
        assert_same_bits(preprocess(load_image(source), spec), theirs_of(name, source), spec)
    else:
        spec = spec_from_processor(saved(PLAIN[name]))
        assert_same_bits(preprocess(load_image(source), spec), theirs(PLAIN[name], source), spec)
    hidden = preprocess(source.convert("RGB"), spec)
    assert not np.array_equal(hidden, preprocess(load_image(source), spec))  # what was hidden matters


@pytest.mark.parametrize("name", ["gif", "png"])
@pytest.mark.parametrize("processor", [*CASES, *PLAIN])
def test_transparent_files_have_transformers_bits_by_path(processor: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"clear.{name}"
    noise(150, 71).quantize(9).save(path, transparency=4)
    if processor in CASES:
        spec = spec_for(processor, own_size(processor, 150, 71))
        expected = theirs_of(processor, str(path))
    else:
        spec = spec_from_processor(saved(PLAIN[processor]))
        expected = theirs(PLAIN[processor], str(path))
    assert_same_bits(preprocess(load_image(path), spec), expected, spec)


def test_frames_of_a_video_are_pictures() -> None:
    """Video-LLaVA's image side takes frames one by one."""
    processor = PLAIN["video_llava"]
    spec = spec_from_processor(saved(processor))
    frames = [noise(64, 48, seed) for seed in range(3)]
    expected = np.stack(processor(frames)["pixel_values_images"])
    assert np.array_equal(np.concatenate([preprocess(frame, spec) for frame in frames]), expected)


# -- one layout for every picture of a bundle ----------------------------------------------------------------


def letterboxed(picture: Image.Image, size: tuple[int, int], mean: Any) -> Image.Image:
    """Padded to the aspect of `size`, written plainly."""
    ratio = size[1] / size[0]
    width = max(picture.width, math.floor(picture.height * ratio + 0.5))
    height = max(picture.height, math.floor(picture.width / ratio + 0.5))
    if width > picture.width:
        height = picture.height
    canvas = Image.new("RGB", (width, height), tuple(int(channel * 255) for channel in mean))
    canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return canvas


def has_layout(name: str, size: tuple[int, int], spec: ImageSpec) -> bool:
    """Whether transformers, held to the bundle's resolution, lays a picture out as the bundle does."""
    if spec.kind != "anyres":
        return own_size(name, *size) == spec.image_size
    target = spec.resolution
    shapes = [(3, size[1], size[0]), (3, *spec.image_size)]
    one, two = (get_patch_output_size(np.empty(shape), target, "channels_first") for shape in shapes)
    return one == two


def in_layout(name: str, picture: Image.Image, spec: ImageSpec) -> np.ndarray:
    """transformers' pixel_values of a picture of the bundle's aspect, held to the bundle's layout."""
    processor = CASES[name].processor
    if spec.kind == "anyres":
        return theirs(processor, picture, image_grid_pinpoints=[list(spec.resolution)])
    if spec.kind == "internvl":
        count = math.prod(spec.tiles)
        return theirs(processor, picture, min_patches=count, max_patches=count)
    resized = picture.resize((spec.image_size[1], spec.image_size[0]), Image.Resampling(spec.resample))
    return theirs(processor, resized, **({"do_resize": False} if spec.kind == "idefics3" else {}))


@pytest.mark.parametrize("size", PICTURES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", [name for name in CASES if name != "smolvlm_unsplit"])
def test_another_layout_is_letterboxed(name: str, which: int, size: tuple[int, int]) -> None:
    image_size, picture = CASES[name].sizes[which], noise(*size)
    spec = spec_for(name, image_size)
    assert spec.image_size == image_size
    if has_layout(name, size, spec):
        expected = in_layout(name, picture, spec) if spec.kind == "anyres" else theirs_of(name, picture)
        assert_same_bits(preprocess(picture, spec), expected, spec)
    else:
        padded = letterboxed(picture, image_size, CASES[name].processor.image_mean)
        expected = in_layout(name, padded, spec)
        if spec.kind == "idefics3" and has_layout(name, padded.size, spec):
            expected = theirs_of(name, padded)
        assert_same_bits(preprocess(picture, spec), expected, spec)


@pytest.mark.parametrize("name", [name for name in CASES if name != "smolvlm_unsplit"])
def test_stretching_adds_no_padding(name: str) -> None:
    """Every tile then lies within the picture, but for the black that anyres itself adds."""
    spec = spec_for(name, CASES[name].sizes[1], fit="stretch")
    red = Image.new("RGB", (61, 401), (255, 0, 0))
    values = preprocess(red, spec)
    assert values.shape == spec.shape
    assert np.array_equal(values[0], preprocess(Image.new("RGB", (401, 61), (255, 0, 0)), spec)[0])
    if spec.kind != "anyres":
        assert source_box(spec, 61, 401) == (0, 0, 61, 401)
        assert np.unique(values).size <= 3


@pytest.mark.parametrize("name", [name for name in CASES if name != "smolvlm_unsplit"])
def test_refusing_names_both_sizes(name: str) -> None:
    spec = spec_for(name, CASES[name].sizes[0], fit="refuse")
    with pytest.raises(VtpError) as caught:
        preprocess(noise(61, 401), spec)
    height, width = CASES[name].sizes[0]
    assert "61x401" in str(caught.value) and f"{width}x{height}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_image_size_of_a_tile_switches_tiling_off() -> None:
    """As transformers does with crop_to_patches=False, or with a longest edge of one tile."""
    picture = noise(200, 90)
    one = spec_from_processor(saved(CASES["internvl"].processor), (64, 64))
    expected = theirs(CASES["internvl"].processor, picture, crop_to_patches=False)
    assert_same_bits(preprocess(picture, one), expected, one)
    small = spec_from_processor(saved(CASES["smolvlm"].processor), (64, 64))
    expected = theirs(CASES["smolvlm"].processor, picture, size={"longest_edge": 64})
    assert_same_bits(preprocess(picture, small), expected, small)


# -- the way back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", [(600, 400), (300, 500), (400, 400)], ids=str)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("qwen", "gemma"))])
def test_the_way_back_to_the_source(name: str, which: int, picture: tuple[int, int]) -> None:
    """Red tells a pixel's column and green its row; both are read off every tile."""
    config = {**saved(CASES[name].processor), "do_rescale": False, "do_normalize": False}
    spec = spec_from_processor(config, CASES[name].sizes[which])
    width, height = picture
    pixels = np.zeros((height, width, 3), np.float64)
    pixels[:, :, 0] = ((np.arange(width) + 0.5) / width * 250)[None, :]
    pixels[:, :, 1] = ((np.arange(height) + 0.5) / height * 250)[:, None]
    values = preprocess(Image.fromarray(pixels.round().astype(np.uint8)), spec)
    boxes = source_boxes(spec, width, height)
    assert len(boxes) == len(values) == spec.shape[0]
    seen = 0.0
    for tile, box in zip(values, boxes, strict=True):
        rows, columns = tile.shape[1:]
        x = box.left + (np.arange(columns) + 0.5) / columns * (box.right - box.left)
        y = box.top + (np.arange(rows) + 0.5) / rows * (box.bottom - box.top)
        near = 1.5 * max((box.right - box.left) / columns, (box.bottom - box.top) / rows)
        edge = 3 * near
        inside = ((y > edge) & (y < height - edge))[:, None] & ((x > edge) & (x < width - edge))[None, :]
        seen += inside.mean()
        gap_x = np.abs(tile[0] / 250 * width - x[None, :])[inside]
        gap_y = np.abs(tile[1] / 250 * height - y[:, None])[inside]
        assert max(gap_x.max(initial=0), gap_y.max(initial=0)) < near
    assert seen / len(values) > 0.04
