"""transformers' image processors of every kind, what they give, and the bundle's settings of each."""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.preprocess import ImageSpec
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
    "gemma4": Case(Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70), ((96, 96), (60, 156))),
    "pixtral": Case(PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 64}), ((64, 64), (40, 64))),
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
    if "num_soft_tokens_per_image" in given:  # filled up to the budget
        count = int(given["num_soft_tokens_per_image"][0]) * processor.pooling_kernel_size**2
        return given["pixel_values"][0, :count].astype(np.float32)
    values = given["pixel_values"] if "pixel_values" in given else given["pixel_values_images"]
    return (values[0] if values.ndim == 5 else values).astype(np.float32)


def own_size(name: str, width: int, height: int) -> tuple[int, int]:
    """An image size whose layout is the one that transformers gives to a picture."""
    processor = CASES[name].processor
    if isinstance(processor, Qwen2VLImageProcessorPil):
        factor, size = processor.patch_size * processor.merge_size, processor.size
        return smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
    if isinstance(processor, Gemma4ImageProcessorPil):
        edge = processor.pooling_kernel_size
        patches = processor.max_soft_tokens * edge**2
        return get_aspect_ratio_preserving_size(height, width, processor.patch_size, patches, edge)
    if isinstance(processor, PixtralImageProcessorPil):
        longest, token = processor.size["longest_edge"], processor.patch_size
        token = token if isinstance(token, int) else token["height"]
        return get_resize_output_image_size(np.zeros((3, height, width)), longest, token, "channels_first")
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


def theirs_of(name: str, picture: Image.Image) -> np.ndarray:
    return theirs(CASES[name].processor, picture)
