"""Kinds that cut tiles or patches: transformers' bits on any picture, and one layout for a bundle."""

import json
import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import SizeDict
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    get_resize_output_image_size as their_longest,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from vtp.engines.errors import UsageError, VtpError
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.media.images import load_image
from vtp.runtime.preprocess import (
    ImageSpec,
    anyres,
    internvl,
    preprocess,
    qwen,
    source_box,
    source_boxes,
    spec_from_json,
    spec_to_json,
)
from vtp.runtime.preprocess.idefics3 import Idefics3Spec

# (width, height): tiny, wide, tall, odd, large.
PICTURES = [(9, 7), (1023, 97), (61, 401), (335, 337), (1811, 1303)]
TINY_POINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168], [168, 112]]


class Case(NamedTuple):
    """A processor, and two image sizes (height, width) to make a bundle for."""

    processor: Any
    sizes: tuple[tuple[int, int], tuple[int, int]]


CASES = {
    "qwen2_vl": Case(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}),
        ((112, 140), (224, 224)),
    ),
    "qwen3_vl": Case(
        Qwen2VLImageProcessorPil(
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": 4096, "longest_edge": 65536},
        ),
        ((256, 256), (64, 256)),
    ),
    "qwen_other_numbers": Case(
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=3, temporal_patch_size=1, resample=2),
        ((96, 60), (120, 120)),
    ),
    "llava_next": Case(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=TINY_POINTS,
        ),
        ((112, 112), (90, 168)),
    ),
    "llava_onevision": Case(
        LlavaOnevisionImageProcessorPil(
            size={"height": 48, "width": 48},
            image_grid_pinpoints=[
                [48 * rows, 48 * columns] for rows in range(1, 5) for columns in range(1, 5)
            ],
        ),
        ((96, 96), (48, 48)),
    ),
    "internvl": Case(
        GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}, crop_to_patches=True),
        ((128, 128), (192, 64)),
    ),
    "internvl_oblong": Case(
        GotOcr2ImageProcessorPil(size={"height": 40, "width": 56}, crop_to_patches=True, min_patches=2),
        ((80, 112), (40, 168)),
    ),
    "idefics3": Case(
        Idefics3ImageProcessorPil(size={"longest_edge": 200}, max_image_size={"longest_edge": 56}),
        ((224, 224), (112, 224)),
    ),
    "smolvlm": Case(
        SmolVLMImageProcessorPil(size={"longest_edge": 256}, max_image_size={"longest_edge": 64}),
        ((256, 256), (256, 64)),
    ),
    "smolvlm_unsplit": Case(
        SmolVLMImageProcessorPil(
            size={"longest_edge": 130}, max_image_size={"longest_edge": 64}, do_image_splitting=False
        ),
        ((64, 64), (64, 64)),
    ),
}
PLAIN = {
    "gemma3": Gemma3ImageProcessorPil(size={"height": 112, "width": 112}),
    "paligemma": SiglipImageProcessorPil(size={"height": 112, "width": 112}),
    "video_llava": VideoLlavaImageProcessor(),
    "internvl_one_tile": GotOcr2ImageProcessorPil(size={"height": 64, "width": 72}),
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(processor: Any) -> dict[str, Any]:
    """What the processor writes as preprocessor_config.json."""
    return json.loads(processor.to_json_string())


def theirs(processor: Any, picture: Image.Image, **changes: Any) -> np.ndarray:
    """transformers' pixel_values of one picture, without the axis that counts pictures."""
    given = processor(picture, return_tensors="np", **changes)
    values = given["pixel_values"] if "pixel_values" in given else given["pixel_values_images"]
    return (values[0] if values.ndim == 5 else values).astype(np.float32)


def own_size(name: str, width: int, height: int) -> tuple[int, int]:
    """An image size whose layout is the one that transformers gives to a picture."""
    processor = CASES[name].processor
    if isinstance(processor, Qwen2VLImageProcessorPil):
        factor, size = processor.patch_size * processor.merge_size, processor.size
        return smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
    if isinstance(processor, GotOcr2ImageProcessorPil):
        tile = (processor.size["height"], processor.size["width"])
        columns, rows = get_optimal_tiled_canvas(
            (height, width), tile, processor.min_patches, processor.max_patches
        )
        return rows * tile[0], columns * tile[1]
    if isinstance(processor, Idefics3ImageProcessorPil | SmolVLMImageProcessorPil):
        grid = processor(Image.new("RGB", (width, height)), return_row_col_info=True)
        tile = processor.max_image_size["longest_edge"]
        return max(1, grid["rows"][0][0]) * tile, max(1, grid["cols"][0][0]) * tile
    return height, width


def spec_for(name: str, size: tuple[int, int], **changes: Any) -> ImageSpec:
    """The bundle's spec; an Idefics3 processor keeps its own longest edge, as it would in transformers."""
    spec = spec_from_processor(saved(CASES[name].processor), size, **changes)
    if isinstance(spec, Idefics3Spec):
        return replace(spec, longest_edge=CASES[name].processor.size["longest_edge"])
    return spec


def assert_same_bits(ours: np.ndarray, expected: np.ndarray, spec: ImageSpec) -> None:
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    assert ours.shape == expected.shape == spec.shape
    assert np.array_equal(ours, expected) and ours.tobytes() == expected.tobytes()


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


# -- the rules by which transformers chooses a layout --------------------------------------------------------

EDGES = st.one_of(st.integers(1, 60), st.integers(1, 4000))


@settings(max_examples=400, deadline=None)
@given(EDGES, EDGES, st.sampled_from([28, 32, 12]), st.integers(1, 400), st.integers(1, 400))
def test_smart_resize_is_transformers(height: int, width: int, factor: int, one: int, two: int) -> None:
    least, most = (factor * factor * count for count in sorted((one, two)))
    if max(height, width) <= 200 * min(height, width):
        expected = smart_resize(height, width, factor, least, most)
        assert qwen._smart_resize((height, width), factor, least, most) == expected


@settings(max_examples=400, deadline=None)
@given(EDGES, EDGES)
@example(1, 4000)
def test_best_resolution_is_transformers(height: int, width: int) -> None:
    for points in (TINY_POINTS, LlavaOnevisionImageProcessorPil.image_grid_pinpoints):
        best = select_best_resolution((height, width), points)
        assert anyres.best_resolution((height, width), [tuple(point) for point in points]) == best
        expected = get_patch_output_size(np.empty((3, height, width), np.uint8), best, "channels_first")
        assert anyres.resized_within((height, width), best) == expected


@settings(max_examples=400, deadline=None)
@given(EDGES, EDGES, st.integers(1, 12), st.integers(1, 12))
def test_best_grid_is_transformers(height: int, width: int, one: int, two: int) -> None:
    least, most = sorted((one, two))
    columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
    assert internvl._best_grid((height, width), (448, 448), least, most) == (rows, columns)


class OnlySizes(Idefics3ImageProcessorPil):
    """transformers' sizes without the work."""

    def resize(self, image: Any, size: Any, resample: Any = None, **_: Any) -> Any:
        if size.longest_edge:
            size = SizeDict(
                **dict(zip(("height", "width"), their_longest(image, size.longest_edge), strict=True))
            )
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))


@settings(max_examples=400, deadline=None)
@given(EDGES, EDGES, st.sampled_from([(364, 1456), (512, 2048), (64, 5000), (512, 512), (56, 200)]))
def test_rows_and_columns_are_transformers(height: int, width: int, sides: tuple[int, int]) -> None:
    tile, longest = sides
    spec = spec_from_processor(
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": longest},
            "max_image_size": {"longest_edge": tile},
        }
    )
    sizes = OnlySizes()
    first = sizes.resize(np.broadcast_to(np.uint8(0), (3, height, width)), SizeDict(longest_edge=longest))
    second = sizes.resize_for_vision_encoder(first, tile)
    assert spec._steps((height, width)) == [first.shape[1:], second.shape[1:]]


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


def theirs_of(name: str, picture: Image.Image) -> np.ndarray:
    return theirs(CASES[name].processor, picture)


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


def test_sizes_without_a_wish() -> None:
    def size(processor: Any, **more: Any) -> tuple[int, int]:
        spec = spec_from_processor({**saved(processor), **more})
        return spec.image_size or spec.fixed_size

    assert size(Qwen2VLImageProcessorPil()) == (448, 448)
    assert size(Qwen2VLImageProcessorPil(patch_size=16)) == (448, 448)
    assert size(CASES["qwen2_vl"].processor) == (224, 224)
    assert size(CASES["llava_next"].processor) == (112, 112)
    assert size(LlavaOnevisionImageProcessorPil()) == (768, 768)
    assert size(GotOcr2ImageProcessorPil()) == (384, 384)
    assert size(GotOcr2ImageProcessorPil(), processor_class="InternVLProcessor") == (768, 768)
    assert size(GotOcr2ImageProcessorPil(max_patches=3), crop_to_patches=True)[0] in (384, 1152)
    assert size(SmolVLMImageProcessorPil(size={"longest_edge": 2048})) == (2184, 2184)
    assert size(CASES["smolvlm_unsplit"].processor) == (64, 64)


def test_what_a_file_says_about_videos_changes_no_picture() -> None:
    plain = saved(CASES["smolvlm"].processor)
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 64}}
    assert spec_from_processor({**plain, "video_sampling": sampling}) == spec_from_processor(plain)


def test_older_qwen_files_are_read_alike() -> None:
    old = {"image_processor_type": "Qwen2VLImageProcessorFast", "min_pixels": 3136, "max_pixels": 1003520}
    assert spec_from_processor(old) == spec_from_processor(saved(Qwen2VLImageProcessorPil()))
    sizes = {"size": {"min_pixels": 3136, "max_pixels": 1003520}}
    assert (
        spec_from_processor({"image_processor_type": "Qwen2VLImageProcessor", **sizes}).max_pixels == 1003520
    )


@pytest.mark.parametrize("name", CASES)
def test_a_spec_survives_json(name: str) -> None:
    spec = spec_for(name, CASES[name].sizes[0])
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


# As vtp has written it since videos came: every kind's keys, in this order, whatever the kind.
SECTION = (
    '{"kind": "anyres", "do_convert_rgb": true, "do_pad": false, "do_resize": true, "shortest_edge": null, '
    '"height": 56, "width": 56, "resample": 3, "do_center_crop": false, "crop_height": null, '
    '"crop_width": null, "do_rescale": true, "rescale_factor": 0.5, "do_normalize": true, '
    '"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.25], "image_height": 112, "image_width": 112, '
    '"fit": "refuse", "min_pixels": null, "max_pixels": null, "patch_size": null, '
    '"temporal_patch_size": null, "merge_size": null, "pinpoints": [[56, 112], [112, 112]], '
    '"min_tiles": null, "max_tiles": null, "longest_edge": null, "do_image_splitting": true, "frames": null}'
)


def test_the_section_of_an_older_bundle_is_read_and_written_alike() -> None:
    spec = spec_from_json(json.loads(SECTION))
    assert (spec.shape, spec.image_size, spec.views) == ((5, 3, 56, 56), (112, 112), 5)
    assert json.dumps(spec_to_json(spec)) == SECTION


def test_keys_that_were_added_later_may_be_left_out() -> None:
    """Bundles from before videos have no "frames", and those from before tiles none of their keys."""
    section = {"kind": "clip", "height": 8, "width": 8}
    assert json.loads(SECTION).keys() == spec_to_json(spec_from_json(section)).keys()


# -- the way back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", [(600, 400), (300, 500), (400, 400)], ids=str)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("qwen")])
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


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "size", "named"),
    [
        ("qwen2_vl", {}, (100, 112), "multiples of 28"),
        ("qwen2_vl", {}, (28, 28), "784 pixels; this processor takes 3136 to 50176"),
        ("qwen2_vl", {}, (2800, 2800), "this processor takes 3136 to 50176"),
        ("qwen2_vl", {"size": {"shortest_edge": 56}}, None, "longest_edge"),
        ("qwen2_vl", {"patch_size": "14"}, None, "patch_size"),
        ("qwen2_vl", {"do_wobble": 1}, None, "do_wobble"),
        ("qwen2_vl", {"do_resize": False}, None, "do_resize"),
        ("llava_next", {"crop_size": {"height": 28, "width": 28}}, None, "one square size"),
        ("llava_next", {"image_grid_pinpoints": [[56, 60]]}, None, "whole tiles of 56"),
        ("llava_next", {"image_grid_pinpoints": "(1x1)"}, None, "image_grid_pinpoints"),
        ("llava_onevision", {"size": {"height": 48, "width": 40}}, None, "one square size"),
        ("internvl", {}, (100, 64), "multiples of 64x64"),
        ("internvl", {}, (64 * 5, 64 * 5), "25 tiles; this processor cuts 2 to 12"),
        ("internvl", {"min_patches": 0}, None, "min_patches 0"),
        ("internvl", {"size": {"shortest_edge": 64}}, None, "height and width"),
        ("idefics3", {}, (100, 64), "multiples of 56"),
        ("idefics3", {"size": {"height": 9, "width": 9}}, None, "longest_edge"),
        ("smolvlm_unsplit", {}, (128, 128), "do_image_splitting is off"),
        ("smolvlm", {"resample": 17}, None, "resample"),
        ("internvl", {"resample": 17}, (128, 128), "resample"),
    ],
)
def test_what_a_processor_cannot_do_is_refused(
    name: str, change: dict[str, Any], size: tuple[int, int] | None, named: str
) -> None:
    with pytest.raises(VtpError) as caught:
        spec_from_processor({**saved(CASES[name].processor), **change}, size)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError) == (size is not None)


def test_other_refusals_are_one_line() -> None:
    with pytest.raises(VtpError, match="do_pan_and_scan"):
        spec_from_processor(saved(Gemma3ImageProcessorPil(do_pan_and_scan=True)))
    with pytest.raises(VtpError, match=r"MllamaImageProcessor.*supported: CLIP.*SmolVLM"):
        spec_from_processor({"image_processor_type": "MllamaImageProcessor"})
    with pytest.raises(UsageError, match=r"image size 300x200 is not supported: .* 112x112 only"):
        spec_from_processor(saved(PLAIN["gemma3"]), (200, 300))
    assert spec_from_processor(saved(PLAIN["gemma3"]), (112, 112)).fixed_size == (112, 112)
    with pytest.raises(UsageError, match="letterbox, stretch, refuse"):
        spec_from_processor(saved(PLAIN["gemma3"]), fit="squeeze")
    with pytest.raises(VtpError, match="kind clip has no min_tiles"):
        spec_from_json({"height": 3, "width": 3, "min_tiles": 3})
    with pytest.raises(VtpError, match="kind internvl has no shortest_edge"):
        spec_from_json({"kind": "internvl", "shortest_edge": 3})
    with pytest.raises(VtpError, match="needs image_height"):
        spec_from_json({"kind": "qwen"})


def test_pictures_too_long_are_refused() -> None:
    long = Image.new("RGB", (2011, 10))
    with pytest.raises(VtpError, match="2011x10 is too long: one edge may be at most 200 times"):
        preprocess(long, spec_for("qwen2_vl", (224, 224)))
    with pytest.raises(VtpError, match="padded to the shape of 112x112 it would be 1000000x1000000"):
        preprocess(Image.new("RGB", (1_000_000, 1)), spec_for("llava_next", (112, 112)))
