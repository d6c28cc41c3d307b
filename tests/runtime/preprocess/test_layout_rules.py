"""The rules by which a picture's layout is chosen are transformers'."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    get_resize_output_image_size as their_longest,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.preprocess import anyres, internvl, qwen

from .processor_kinds import TINY_POINTS

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
    assert internvl.best_grid((height, width), (448, 448), internvl.grids_of(least, most)) == (rows, columns)


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 12), (2, 40), (7, 7), (5, 9)])
def test_grids_of_internvl_are_all_of_that_many_tiles(least: int, most: int) -> None:
    sides = range(1, most + 1)
    every = {(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most}
    found = internvl.grids_of(least, most)
    assert len(found) == len(every) and set(found) == every
    assert [x * y for x, y in found] == sorted(x * y for x, y in found)


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
