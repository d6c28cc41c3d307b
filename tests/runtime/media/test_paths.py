"""Paths of pictures in messages: bounded and escaped, whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtp.engines.errors import UNSAFE, VtpError
from vtp.runtime.media.images import check_image, load_image

LONG = "x" * 5000


@pytest.mark.parametrize("look", [load_image, check_image])
@pytest.mark.parametrize(
    "path",
    [
        LONG,
        "/".join(["y" * 200] * 15),
        "a\x1b[2J\n\u202e.png",
        f"https://{LONG}",
        "nul\0.png",
        f"data:{LONG}",
    ],
    ids=["long", "deep", "terminal", "address", "nul", "data"],
)
def test_a_path_is_shown_bounded_and_escaped(look: object, path: str) -> None:
    with pytest.raises(VtpError) as caught:
        look(path)  # type: ignore[operator]
    message = str(caught.value)
    assert len(message) < 350 and not UNSAFE.search(message)


def test_folders_and_broken_files_likewise(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["z" * 200] * 5)
    folder.mkdir(parents=True)
    (folder / "p.png").write_bytes(b"no picture")
    for path in (folder, folder / "p.png"):
        with pytest.raises(VtpError) as caught:
            load_image(path)
        assert len(str(caught.value)) < 450 and "…" in str(caught.value)
