"""`pixel_values` equal transformers' PIL processors bit for bit, and the way back to the source is right."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import vtp.scenes
from vtp.engines.errors import VtpError
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.media.images import load_image
from vtp.runtime.preprocess import ImageSpec, preprocess, source_box, spec_from_json, spec_to_json
from vtp.runtime.preprocess.clip import ClipSpec


def crop(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}


LLAVA = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=crop(336, 336))
PROCESSORS: dict[str, PilBackend] = {
    "llava_1_5": LLAVA,
    "clip_defaults": CLIPImageProcessorPil(),
    "crop_larger_than_resized": CLIPImageProcessorPil(size={"shortest_edge": 100}, crop_size=crop(161, 120)),
    "crop_odd": CLIPImageProcessorPil(size={"shortest_edge": 99}, crop_size=crop(64, 97)),
    "exact_size": CLIPImageProcessorPil(size={"height": 70, "width": 112}, do_center_crop=False),
    "siglip": SiglipImageProcessorPil(size={"height": 96, "width": 96}, resample=2),
    "pad_to_square": LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 112}, crop_size=crop(112, 112)
    ),
    "pad_without_crop": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 90}, do_center_crop=False),
    "nearest_unnormalised": CLIPImageProcessorPil(resample=0, do_normalize=False),
    "lanczos_unscaled": CLIPImageProcessorPil(resample=1, do_rescale=False),
    "crop_only": CLIPImageProcessorPil(do_resize=False, crop_size=crop(57, 58)),
    "other_numbers": CLIPImageProcessorPil(
        rescale_factor=1 / 127.5, image_mean=[1.0, 0.9, 1.1], image_std=[0.3, 1.0, 2.0]
    ),
}
SIZES = [(640, 427), (37, 501), (501, 37), (336, 336), (335, 337), (1, 1), (2, 9), (1023, 767)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(processor: PilBackend) -> dict[str, Any]:
    """What the processor writes as preprocessor_config.json."""
    return json.loads(processor.to_json_string())


def assert_same_bits(image: Image.Image, processor: PilBackend, spec: ImageSpec) -> None:
    expected = processor(image, return_tensors="np")["pixel_values"].astype(np.float32)
    ours = preprocess(image, spec)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous and ours.shape == expected.shape
    assert ours.tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_transformers_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    assert_same_bits(noise(*size), PROCESSORS[name], spec_from_processor(saved(PROCESSORS[name])))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGBA", "I;16"])
def test_every_mode_has_the_same_bits_after_loading(mode: str) -> None:
    if mode == "I;16":
        source = Image.fromarray((np.arange(90 * 61, dtype=np.uint16) * 11).reshape(90, 61))
    else:
        source = noise(61, 90).convert(mode)
    assert source.mode == mode
    assert_same_bits(load_image(source), LLAVA, spec_from_processor(saved(LLAVA)))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    edge=st.integers(1, 70),
    cropped=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    pad=st.booleans(),
    resample=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_any_size_any_crop_any_filter(
    width: int, height: int, edge: int, cropped: tuple[int, int], pad: bool, resample: int, seed: int
) -> None:
    processor = LlavaImageProcessorPil(
        do_pad=pad, size={"shortest_edge": edge}, crop_size=crop(*cropped), resample=resample
    )
    assert_same_bits(noise(width, height, seed), processor, spec_from_processor(saved(processor)))


def test_the_built_in_models_file_is_read() -> None:
    config = json.loads((vtp.scenes.model_dir() / "processor_config.json").read_text(encoding="utf-8"))
    spec = spec_from_processor(config)
    assert spec.fixed_size == (336, 336)
    assert_same_bits(noise(500, 333), CLIPImageProcessorPil(**config["image_processor"]), spec)


def test_older_files_are_read_alike() -> None:
    plain = spec_from_processor(saved(LLAVA))
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336, "do_pad": None}
    assert spec_from_processor(old) == plain
    assert spec_from_processor({**saved(LLAVA), "image_processor_type": "CLIPImageProcessorFast"}) == plain


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_spec_survives_json(name: str) -> None:
    spec = spec_from_processor(saved(PROCESSORS[name]))
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_processor_type": "MllamaImageProcessor"}, "MllamaImageProcessor"),
        ({"image_processor_type": None}, "without a type"),
        ({"do_wobble": True}, "do_wobble"),
        ({"do_pad": True}, "do_pad"),
        ({"pad_size": {"height": 3, "width": 3}}, "pad_size"),
        ({"size": {"longest_edge": 300}}, "longest_edge"),
        ({"size": {"shortest_edge": 3, "longest_edge": 300}}, "longest_edge"),
        ({"size": {"shortest_edge": 0}}, "shortest_edge"),
        ({"crop_size": {"shortest_edge": 3}}, "crop size"),
        ({"resample": 9}, "resample"),
        ({"image_std": [1.0, 0.0, 1.0]}, "zero"),
        ({"image_mean": [1.0, 0.5]}, "mean"),
        ({"image_mean": [1.0, 0.5, "x"]}, "mean"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(VtpError) as caught:
        spec_from_processor({**saved(LLAVA), **change})
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_bad_specs_and_images_are_refused() -> None:
    with pytest.raises(VtpError, match="unknown keys"):
        spec_from_json({**spec_to_json(spec_from_processor(saved(LLAVA))), "colour": 1})
    with pytest.raises(VtpError, match="unknown image preprocessing"):
        spec_from_json({"kind": "hologram", "shortest_edge": 3})
    with pytest.raises(VtpError, match="shortest_edge, or height and width"):
        ClipSpec(shortest_edge=3, height=3, width=3)
    with pytest.raises(VtpError, match="crop_height"):
        ClipSpec(shortest_edge=3, do_center_crop=True, crop_width=3)
    with pytest.raises(VtpError, match="another size"):
        _ = ClipSpec(shortest_edge=3).fixed_size
    with pytest.raises(VtpError, match="load_image"):
        preprocess(Image.new("L", (3, 3)), ClipSpec(shortest_edge=3))


@pytest.mark.parametrize("pad", [False, True])
def test_long_thin_pictures_cannot_exhaust_memory(pad: bool) -> None:
    spec = ClipSpec(do_pad=pad, shortest_edge=336)
    with pytest.raises(VtpError, match="at most"):
        preprocess(Image.new("RGB", (1_000_000, 1)), spec)


@pytest.mark.parametrize("size", [(600, 400), (300, 500), (256, 256)], ids=str)
@pytest.mark.parametrize(
    "name", ["llava_1_5", "crop_odd", "exact_size", "pad_to_square", "crop_larger_than_resized"]
)
def test_the_way_back_to_the_source(name: str, size: tuple[int, int]) -> None:
    """Red tells a pixel's column and green its row; both are read off the model's input."""
    spec = spec_from_processor({**saved(PROCESSORS[name]), "do_rescale": False, "do_normalize": False})
    width, height = size
    pixels = np.zeros((height, width, 3), np.float64)
    pixels[:, :, 0] = ((np.arange(width) + 0.5) / width * 250)[None, :]
    pixels[:, :, 1] = ((np.arange(height) + 0.5) / height * 250)[:, None]
    pixels[:, :, 2] = 255
    values = preprocess(Image.fromarray(pixels.round().astype(np.uint8)), spec)[0]
    box = source_box(spec, width, height)
    rows, columns = values.shape[1:]
    x = box.left + (np.arange(columns) + 0.5) / columns * (box.right - box.left)
    y = box.top + (np.arange(rows) + 0.5) / rows * (box.bottom - box.top)
    inside_x = (x > 8) & (x < width - 8)
    inside_y = (y > 8) & (y < height - 8)
    inside = inside_y[:, None] & inside_x[None, :]
    assert inside.mean() > 0.3
    read_x, read_y = values[0] / 250 * width, values[1] / 250 * height
    assert np.abs(read_x - x[None, :])[inside].max() < 2.5
    assert np.abs(read_y - y[:, None])[inside].max() < 2.5
    outside = ((x < -8) | (x > width + 8))[None, :] | ((y < -8) | (y > height + 8))[:, None]
    assert (values[2][outside] < 200).all()  # padding: no blue of the picture there
    assert outside.any() == (
        name == "crop_larger_than_resized" or (name == "pad_to_square" and width != height)
    )
