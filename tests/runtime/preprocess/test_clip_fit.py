"""--image-fit of processors that take every picture: what becomes of its sides, as in transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vtp.engines.errors import UsageError
from vtp.export.checkpoint.processors import spec_from_processor
from vtp.runtime.commands.run import main
from vtp.runtime.media.cut_off import cut_off_line, share_cut_off
from vtp.runtime.pipeline import Pipeline
from vtp.runtime.preprocess import preprocess
from vtp.serve.streams.cli import main as watch

from .processor_kinds import CASES, PICTURES, assert_same_bits, noise, saved, theirs

EDGE = {"height": 56, "width": 56}
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=EDGE)
NAMED = {"image_mean": CLIP.image_mean, "image_std": CLIP.image_std}
SIGLIP = SiglipImageProcessorPil(size=EDGE)
# The processor that does by itself what each word asks of CLIP's.
SAME_AS = {
    "crop": CLIP,
    "letterbox": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 56}, crop_size=EDGE),
    "stretch": SiglipImageProcessorPil(size=EDGE, resample=3, **NAMED),
}


@pytest.mark.parametrize("size", PICTURES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("fit", SAME_AS)
def test_pixels_are_those_of_the_processor_that_does_so(fit: str, size: tuple[int, int]) -> None:
    spec, picture = spec_from_processor(saved(CLIP), fit=fit), noise(*size)
    assert_same_bits(preprocess(picture, spec), theirs(SAME_AS[fit], picture), spec)
    assert share_cut_off(spec, *size) == pytest.approx(0, abs=1e-9) or fit == "crop"


def test_siglip_can_crop() -> None:
    cropping = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=EDGE, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2
    )
    spec, picture = spec_from_processor({**saved(SIGLIP), "resample": 2}, fit="crop"), noise(120, 90)
    assert_same_bits(preprocess(picture, spec), theirs(cropping, picture), spec)


def test_left_out_it_is_the_processors_own_way() -> None:
    for processor in (CLIP, SIGLIP, SAME_AS["letterbox"]):
        spec, picture = spec_from_processor(saved(processor)), noise(120, 90)
        assert_same_bits(preprocess(picture, spec), theirs(processor, picture), spec)


def test_words_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="takes pictures of any shape; choose crop, letterbox, stretch"):
        spec_from_processor(saved(CLIP), fit="refuse")
    with pytest.raises(UsageError, match="by their shape; choose letterbox, stretch, refuse"):
        spec_from_processor(saved(CASES["qwen2_vl"].processor), fit="crop")
    oblong = SiglipImageProcessorPil(size={"height": 28, "width": 56})
    with pytest.raises(UsageError, match="square input, not 56x28"):
        spec_from_processor(saved(oblong), fit="letterbox")


def test_a_camera_loses_a_quarter() -> None:
    plain = CLIPImageProcessorPil()
    spec = spec_from_processor(saved(plain))
    for size in ((640, 480), (480, 640)):
        assert share_cut_off(spec, *size) == pytest.approx(0.25, abs=0.002)
    assert "25% of a picture of 640x480 is cut off" in str(cut_off_line(spec, 640, 480))
    assert cut_off_line(spec, 500, 500) is None
    assert cut_off_line(spec_from_processor(saved(plain), fit="letterbox"), 640, 480) is None


def test_vtp_run_says_so(
    exported: Callable[[str], Any], picture_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(tmp_path / "square.png")
    for image, told in ((picture_file, True), (tmp_path / "square.png", False)):
        ask = ["--image", str(image), "--prompt", "how ?", "--max-new-tokens", "1"]
        assert main([str(exported("vispruner").folder), *ask]) == 0
        assert ("of a picture of 120x90 is cut off" in capsys.readouterr().err) == told


def test_vtp_watch_says_so_once(
    exported: Callable[[str], Any], picture_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(picture_file.read_bytes())
    ask = ["--prompt", "how ?", "--max-new-tokens", "1", "--json"]
    assert watch([str(exported("vispruner").folder), str(tmp_path), *ask]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and err.count("of a picture of 120x90 is cut off") == 1


def test_python_is_warned_once_where_it_asked(exported: Callable[[str], Any], picture_file: Path) -> None:
    square, wide = np.zeros((50, 50, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)
    with Pipeline.load(exported("vispruner").folder, "ort-cpu", threads=1) as pipe:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.generate(square, "how ?", max_new_tokens=1)
        with pytest.warns(UserWarning, match="24% of a picture of 64x48 is cut off at its sides") as told:
            pipe.generate(wide, "how ?", max_new_tokens=1)
            pipe.generate_batch([picture_file], ["how ?"], max_new_tokens=1)
    assert [one.filename for one in told] == [__file__]
