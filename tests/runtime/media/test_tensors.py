"""torch tensors, and arrays in the order of OpenCV's channels, are the pictures that they show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.media.images import MAX_PIXELS, check_image, load_image
from vtp.runtime.media.videos import check_video, load_video

from .picture_files import noise

RGB = noise(13, 21, 3)  # uint8 [13, 21, 3]
LEVELS = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)  # every level in every channel


def shown(source: Any, color: str = "rgb") -> np.ndarray:
    check_image(source)
    return np.asarray(load_image(source, color))


@pytest.mark.parametrize("pixels", [RGB, LEVELS], ids=["noise", "levels"])
@pytest.mark.parametrize(
    "form",
    [
        lambda one: one,
        lambda one: one.permute(2, 0, 1),
        lambda one: one.permute(2, 0, 1).contiguous().float() / 255,  # torchvision's ToTensor
        lambda one: one.double() / 255,
        lambda one: (one.float() / 255).requires_grad_(),
        lambda one: torch.nn.Parameter(one.float() / 255),
    ],
    ids=["last", "first", "first float32", "last float64", "with a gradient", "a subclass"],
)
def test_a_tensor_is_its_picture(pixels: np.ndarray, form: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert (shown(form(torch.from_numpy(pixels))) == pixels).all()


def test_half_precision_grey_and_alpha() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert (shown((levels / 255).half())[..., 0] == levels.numpy()).all()
    assert (shown(levels) == levels.numpy()[..., None]).all()
    eighth = (levels / 256).to(torch.float8_e4m3fn)
    assert (shown(eighth) == shown(eighth.float())).all()
    clear = torch.cat([torch.from_numpy(RGB), torch.zeros(13, 21, 1, dtype=torch.uint8)], 2)
    assert (shown(clear) == 255).all() and (shown(clear.permute(2, 0, 1)) == 255).all()


def test_what_could_be_either_has_its_channels_first() -> None:
    either = torch.arange(3 * 5 * 3, dtype=torch.uint8).reshape(3, 5, 3)
    assert (shown(either) == either.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(1, 3, 4, 4), r"is a batch: give one picture"),
        (torch.zeros(4), r"must be \[3, height, width\] or \[height, width, 3\]"),
        (torch.zeros(5, 6, 7), r"must be \[3, height, width\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"uint8 .* or floating point .*, not int64"),
        (torch.zeros(3, 4, 4, dtype=torch.int8), r"not int8"),
        (torch.full((3, 4, 4), 255.0), r"values 0 to 1, not 255 to 255; undo the normalisation"),
        (torch.full((3, 4, 4), float("nan")), r"values 0 to 1, not nan"),
        (torch.tensor([-0.1]).expand(3, 4, 4), r"not -0.1 to -0.1"),
        (torch.zeros(3, 4, 4).to_sparse(), r"must hold all of its values, and this one is sparse_coo"),
        (torch.zeros(3, 4, 4, device="meta"), r"must hold all of its values, and this one is on the device"),
        (torch.zeros(3, 0, 4), r"there is nothing to see"),
        (torch.zeros(1).expand(3, 2, MAX_PIXELS), r"at most [\d,]+ are taken"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(VtpError, match=says) as caught:
        shown(tensor)
    assert "\n" not in str(caught.value)


def test_frames_of_a_video_may_be_a_tensor() -> None:
    clip = torch.from_numpy(np.stack([RGB, RGB[::-1], RGB[:, ::-1], RGB]))
    for given in (clip, clip.permute(0, 3, 1, 2).float() / 255, list(clip)):
        check_video(given, 2)
        first, second = (np.asarray(one) for one in load_video(given, 2))
        assert (first == RGB).all() and (second == RGB[:, ::-1]).all()
    with pytest.raises(UsageError, match="has 1 frame"):
        check_video(clip[0], 2)


# -- the order of channels -----------------------------------------------------------------------------------


def test_bgr_is_opencvs() -> None:
    bgr = RGB[:, :, ::-1]
    assert (shown(bgr, "bgr") == RGB).all() and (shown(torch.from_numpy(bgr.copy()), "bgr") == RGB).all()
    opaque = np.dstack([bgr, np.full((13, 21), 255, np.uint8)])
    assert (shown(opaque, "bgr") == RGB).all()
    grey = RGB[..., 0]
    assert (shown(grey, "bgr") == grey[..., None]).all()
    assert (shown(Image.fromarray(RGB), "bgr") == RGB).all()  # it says its order itself
    frames = load_video(np.stack([bgr, bgr]), 2, "bgr")
    assert all((np.asarray(frame) == RGB).all() for frame in frames)


def test_a_pipeline_takes_them(exported: Callable[[str], Any], picture: Image.Image) -> None:
    rgb = np.asarray(picture)
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipe:
        ask = {"prompt": "how ?", "max_new_tokens": 3, "logprobs": 0}
        wanted = pipe.generate(picture, **ask)
        for image, color in ((rgb[:, :, ::-1], "bgr"), (torch.from_numpy(rgb.copy()), "rgb")):
            result = pipe.generate(image, **ask, color=color)
            assert (result.token_ids, result.logprobs) == (wanted.token_ids, wanted.logprobs)
        swapped = pipe.generate(rgb[:, :, ::-1], **ask)
        assert swapped.logprobs != wanted.logprobs
        with pytest.raises(UsageError, match="color 'BGR' is not known; choose rgb or bgr"):
            pipe.generate(rgb, **ask, color="BGR")
