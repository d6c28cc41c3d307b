"""LFM2-VL's pictures: bit for bit what transformers' processor makes of them, resized as torch does it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.preprocess import preprocess, source_box, spec_from_json, spec_to_json
from vtp.runtime.preprocess.naflex import NaflexSpec, default_size, resize_fixed_point

from ...stand_ins.torch_resizing import lfm2_image_processor

PUBLISHED: dict[str, Any] = {"encoder_patch_size": 16, "min_image_tokens": 64, "max_image_tokens": 256}
SMALL: dict[str, Any] = {
    "encoder_patch_size": 4,
    "min_image_tokens": 4,
    "max_image_tokens": 24,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.7],
}
# Settings, picture (height, width), sha256 of patches by transformers 5.23, torchvision 0.28.0 (AVX-512).
CASES: list[tuple[dict[str, Any], tuple[int, int], str]] = [
    (PUBLISHED, (512, 512), "54eb92bfcd903952"),
    (PUBLISHED, (480, 640), "ddf2640d8b2cab4c"),
    (PUBLISHED, (37, 91), "fa3da0f19ae9aed3"),
    (PUBLISHED, (600, 1003), "29802aaaad614698"),
    (SMALL, (32, 40), "1c53e24644609cc0"),
    (SMALL, (64, 80), "859a36fd9ad47c59"),
    (SMALL, (50, 70), "5fa7347eef1a8ab1"),
    (SMALL, (5, 9), "83c5a1db302c677f"),
    (SMALL, (300, 17), "fef159a8a254e7f5"),
    (SMALL, (1, 1), "641594b4384652a6"),
]


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("settings", "size", "digest"), CASES)
def test_pixels_are_transformers(settings: dict[str, Any], size: tuple[int, int], digest: str) -> None:
    processor, image = lfm2_image_processor(**settings, do_image_splitting=False), picture(*size)
    given = processor(image, return_tensors="pt", return_row_col_info=True)
    wanted = given["pixel_values"][0, : int(given["pixel_attention_mask"].sum())].numpy()
    made_for = tuple(int(edge) for edge in given["image_sizes"][0])
    config = {**json.loads(processor.to_json_string()), "image_processor_type": "Lfm2VlImageProcessorFast"}
    spec = spec_from_processor(config, made_for, "refuse")
    found = preprocess(image, spec)
    assert np.array_equal(found, wanted)
    assert hashlib.sha256(wanted.tobytes()).hexdigest()[:16] == digest
    assert spec.shape == found.shape and spec_from_json(spec_to_json(spec)) == spec


@pytest.mark.parametrize(
    ("old", "new"), [((40, 64), (8, 17)), ((9, 5), (31, 5)), ((7, 300), (20, 3)), ((3, 3), (3, 3))]
)
def test_resizing_is_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Larger, smaller, along one edge, not at all; noise and the two ends of the scale."""
    noise = np.asarray(picture(*old))
    for pixels in (noise, np.where(noise > 127, 255, 0).astype(np.uint8)):
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        wanted = functional.interpolate(tensor, new, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        assert np.array_equal(resize_fixed_point(pixels, new), wanted.numpy())


def test_other_shapes_are_padded_or_refused() -> None:
    config = {**SMALL, "image_processor_type": "Lfm2VlImageProcessor"}
    wide, square = picture(20, 200), Image.new("RGB", (40, 40), (255, 255, 255))
    spec = spec_from_processor(config, (32, 48))
    assert preprocess(wide, spec).shape == spec.shape == (96, 48)
    box = source_box(spec, 200, 20)
    assert (box.left, box.right) == (0, 200) and box.top < 0 and box.bottom > 20
    mean_colour = preprocess(square, spec).reshape(8, 12, 4, 4, 3)[:, 0]
    assert np.abs(mean_colour).max() < 0.02  # the padding's
    with pytest.raises(VtpError, match="a picture of 200x20 does not have the layout"):
        preprocess(wide, spec_from_processor(config, (32, 48), "refuse"))


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, (20, 48), "image size 48x20 is not made of whole visual tokens; give multiples of 8"),
        (
            {"do_image_splitting": False},
            (64, 64),
            "image size 64x64 has 4096 pixels; this processor takes 256 to 1536",
        ),
        (
            {},
            (48, 64),
            "image size 64x48 has 3072 pixels; this processor shows at most 1536 in one piece, .* give 40x32",
        ),
        ({"resample": 3}, (32, 48), "resample must be 2, not 3"),
        ({"do_normalize": False}, (32, 48), "kind naflex needs do_rescale and do_normalize"),
        ({"min_image_tokens": 0}, (32, 48), "min_image_tokens is 0; it must be a positive number"),
        (
            {"min_image_tokens": 99},
            (32, 48),
            "min_image_tokens 99 of the image processor exceeds max_image_tokens",
        ),
        ({"encoder_patch_size": "4"}, (32, 48), "encoder_patch_size is '4'; it must be a positive number"),
    ],
)
def test_what_is_not_served(change: dict[str, Any], size: tuple[int, int], message: str) -> None:
    config = {**SMALL, "image_processor_type": "Lfm2VlImageProcessor", **change}
    with pytest.raises((UsageError, VtpError), match=message):
        spec_from_processor(config, size)


def test_the_default_is_a_large_square() -> None:
    assert default_size(64 * 1024, 256 * 1024, 32) == (512, 512)
    assert default_size(64, 64 * 5, 8) == (16, 16)
    spec = spec_from_processor({"image_processor_type": "Lfm2VlImageProcessorFast"})
    assert isinstance(spec, NaflexSpec) and spec.image_size == (512, 512) and spec.shape == (1024, 768)
