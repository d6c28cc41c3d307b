"""The picture of kept patches: right pixels in colour, all else dimmed, written whole or refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.media.show_kept import check_picture_path, save_picture, show_kept, show_kept_frames
from vtp.runtime.preprocess import ImageSpec, source_box
from vtp.runtime.preprocess.clip import ClipSpec
from vtp.runtime.preprocess.internvl import InternvlSpec

LLAVA = ClipSpec(shortest_edge=336, do_center_crop=True, crop_height=336, crop_width=336)
EXACT = ClipSpec(height=336, width=336)
PADDED = ClipSpec(do_pad=True, shortest_edge=336)


def bright(width: int, height: int) -> Image.Image:
    """A picture of bright, strongly coloured noise, in which dimming shows at every pixel."""
    pixels = np.random.default_rng(0).integers(120, 200, (height, width, 3), dtype=np.uint8)
    pixels[:, :, 0] += 55
    return Image.fromarray(pixels)


def patch_pixels(spec: ImageSpec, size: tuple[int, int], grid: tuple[int, int], index: int) -> np.ndarray:
    """Bool [H, W]: pixels whose centre lies in a patch, found one by one."""
    box = source_box(spec, *size)
    row, column = divmod(index, grid[1])
    step_x, step_y = (box.right - box.left) / grid[1], (box.bottom - box.top) / grid[0]
    inside = np.zeros((size[1], size[0]), bool)
    for y in range(size[1]):
        for x in range(size[0]):
            in_x = column <= (x + 0.5 - box.left) / step_x < column + 1
            in_y = row <= (y + 0.5 - box.top) / step_y < row + 1
            inside[y, x] = in_x and in_y
    return inside


@pytest.mark.parametrize("spec", [LLAVA, EXACT, PADDED], ids=["crop", "exact", "pad"])
@pytest.mark.parametrize("size", [(90, 60), (40, 77), (50, 50)], ids=str)
def test_kept_patches_keep_their_pixels_and_no_others(spec: ImageSpec, size: tuple[int, int]) -> None:
    grid, kept = (12, 12), [0, 5, 66, 67, 78, 143]
    before = np.asarray(bright(*size)).astype(int)
    after = np.asarray(show_kept(bright(*size), spec, grid, kept)).astype(int)
    inside = np.any([patch_pixels(spec, size, grid, index) for index in kept], axis=0)
    assert inside.any() and not inside.all()
    outlined = (
        0 if min(np.ptp(source_box(spec, *size)[::2]), np.ptp(source_box(spec, *size)[1::2])) < 72 else 1
    )
    same = (after == before).all(axis=2)
    if not outlined:
        np.testing.assert_array_equal(same, inside)
    assert not same[~inside].any()
    assert (after[~inside].sum(axis=1) < 0.6 * before[~inside].sum(axis=1)).all()
    assert (np.ptp(after[~inside], axis=1) == 0).all()  # gray


def test_a_video_is_a_sheet_of_its_frames() -> None:
    """Three frames of a CLS token and 2 x 2 patches each: patch 3 of the second is kept, CLS of the third."""
    frames = [bright(20, 20) for _ in range(3)]
    sheet = np.asarray(show_kept_frames(frames, EXACT, (2, 2), [1, 6, 11], [6 + 3, 10])).astype(int)
    assert sheet.shape == (46, 46, 3)  # two columns, two rows, a gap of 6
    second = sheet[:20, 26:]
    coloured = np.ptp(second, axis=2) > 0
    assert coloured[10:, 10:].all() and not coloured[:10].any() and not coloured[:, :10].any()
    assert (np.ptp(sheet[:20, :20], axis=2) == 0).all() and (np.ptp(sheet[26:, :20], axis=2) == 0).all()
    assert (sheet[26:, 26:] == 0).all()  # no fourth frame


def test_an_outline_runs_inside_kept_regions_only() -> None:
    size, grid = (480, 480), (8, 8)  # patches of 60 pixels: a line of 2
    before = np.asarray(bright(*size)).astype(int)
    after = np.asarray(show_kept(bright(*size), LLAVA, grid, np.array([9, 10]))).astype(int)
    changed = (after != before).any(axis=2)
    kept = np.zeros((480, 480), bool)
    kept[60:120, 60:180] = True
    line = np.zeros_like(kept)
    line[60:120, 60:180] = True
    line[62:118, 62:178] = False  # no line between the two neighbours
    np.testing.assert_array_equal(changed, ~kept | line)
    assert after[line].mean() > before[line].mean()


def test_all_kept_is_the_picture_and_none_is_all_dim() -> None:
    picture = bright(336, 336)
    everything = np.asarray(show_kept(picture, LLAVA, (24, 24), range(576)))
    np.testing.assert_array_equal(everything, np.asarray(picture))
    nothing = np.asarray(show_kept(picture, LLAVA, (24, 24), []))
    assert nothing.max() < np.asarray(picture).min()


def test_what_the_model_did_not_see_is_darker_than_what_was_dropped() -> None:
    picture = Image.new("RGB", (400, 200), (90, 200, 160))  # the model sees columns 100 to 299
    shown = np.asarray(show_kept(picture, LLAVA, (24, 24), [0])).astype(int)
    seen, unseen = shown[100, 299], shown[100, 300]
    assert unseen.max() < 0.7 * seen.min()
    assert (shown[100, 99] == unseen).all() and (shown[100, 100] == seen).all()


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    data=st.data(),
)
def test_any_size_and_grid_gives_a_picture(
    width: int, height: int, rows: int, columns: int, data: st.DataObject
) -> None:
    kept = data.draw(st.lists(st.integers(0, rows * columns - 1)))
    spec = data.draw(st.sampled_from([LLAVA, EXACT, PADDED]))
    picture = bright(width, height)
    shown = show_kept(picture, spec, (rows, columns), kept)
    assert shown.size == (width, height) and shown.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(bright(width, height)))


@pytest.mark.parametrize("kept", [[-1], [576], [3, 900]], ids=str)
def test_indices_outside_the_grid_are_refused(kept: list[int]) -> None:
    with pytest.raises(VtpError, match="0 to 575"):
        show_kept(bright(30, 30), LLAVA, (24, 24), kept)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp"])
def test_pictures_are_written_in_the_format_of_their_suffix(suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"kept{suffix}"
    target.write_text("an older picture")
    assert save_picture(bright(30, 20), str(target)) == target
    with Image.open(target) as image:
        assert image.size == (30, 20)
        assert image.format == {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix.lower(), suffix[1:].upper())
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_paths_that_cannot_hold_a_picture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    cases = {
        "kept.pdf": "'.pdf'",
        "kept": "no suffix",
        "absent/kept.png": "does not exist",
        "folder.png": "directory",
    }
    for name, named in cases.items():
        with pytest.raises(UsageError) as caught:
            check_picture_path(tmp_path / name)
        assert named in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """The system takes a part of the picture and refuses the rest, as a full disk does."""
    resource = pytest.importorskip("resource", reason="limits of files' sizes are POSIX")
    for suffix in ("png", "jpg", "bmp", "webp"):
        target = tmp_path / f"kept.{suffix}"
        target.write_text("an older picture")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(VtpError, match="File too large"):
                save_picture(bright(90, 90), target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"an older picture"}
    assert len(list(tmp_path.iterdir())) == 4


def test_several_tiles_are_refused() -> None:
    spec = InternvlSpec(height=8, width=8, min_tiles=1, max_tiles=9, image_height=16, image_width=16)
    with pytest.raises(VtpError, match="sees a picture in 5 tiles"):
        show_kept(Image.new("RGB", (30, 30)), spec, (2, 2), [0])
