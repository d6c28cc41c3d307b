"""Settings of image processors: sizes, older files, the manifest's section, and what is refused."""

import json
from typing import Any

import pytest
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vtp.engines.errors import UsageError, VtpError
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.preprocess import preprocess, spec_from_json, spec_to_json

from .processor_kinds import CASES, PLAIN, saved, spec_for


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
        ("internvl", {"max_patches": 65536}, None, "max_tiles 65536 is more than 256"),
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
