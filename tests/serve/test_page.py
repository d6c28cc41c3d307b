"""The page may run its own script and style and nothing else; kept tokens lie where they are drawn."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.runtime.media.show_kept import show_kept
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.clip import ClipSpec
from vtp.runtime.preprocess.internvl import InternvlSpec
from vtp.serve.http.pictures.kept_places import kept_places

from .client import Site, shown, words

HTML = files("vtp.serve").joinpath("page", "index.html").read_text(encoding="utf-8")
CROPPED = ClipSpec(shortest_edge=336, do_center_crop=True, crop_height=336, crop_width=336)


def manifest(spec: ImageSpec, grid: list[int]) -> Any:
    return SimpleNamespace(image=spec, visual=SimpleNamespace(grid=grid))


def test_the_page_is_sent_whole_and_only_its_own_script_and_style_may_run(site: Site) -> None:
    answer = site.send("/")
    assert answer.status == 200 and answer.content.decode() == HTML
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", HTML, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert site.send("/", method="HEAD").status == 200


def test_the_page_needs_nothing_from_anywhere_else() -> None:
    """No address, no attribute that the policy would block, no text that becomes code or markup."""
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"// .*", "", HTML))
    assert not re.search(
        r"\bstyle=|\bon[a-z]+=|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", HTML
    )


def test_an_answer_says_where_the_kept_tokens_lie(site: Site, alone: Pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    content = [shown(picture), words("what ?")]
    answer = site.chat(content, max_tokens=2, vtp={"show_kept": True, "keep_tokens": 3})
    result = alone.generate(picture, "what ?", max_new_tokens=2, keep_tokens=3)
    assert answer.json["vtp"]["kept"] == kept_places(alone.manifest, [picture.size], result.kept)
    assert answer.json["vtp"]["kept"][0]["kept"] == result.kept and len(result.kept) == 3
    assert "kept" not in site.chat(content, max_tokens=2).json["vtp"]
    assert site.chat(content, vtp={"show_kept": "yes"}).error["param"] == "vtp.show_kept"
    assert site.chat("what ?", max_tokens=2, vtp={"show_kept": True}).json["vtp"]["kept"] == []


@pytest.mark.parametrize(
    "spec", [CROPPED, ClipSpec(height=336, width=336), ClipSpec(do_pad=True, shortest_edge=336)]
)
@pytest.mark.parametrize("size", [(90, 60), (40, 77), (50, 50)])
def test_places_are_those_of_the_drawn_picture(spec: ImageSpec, size: tuple[int, int]) -> None:
    """As a client draws them: pixels whose centre lies in a kept cell are those that `show_kept` leaves."""
    grid, kept = (12, 12), [0, 5, 66, 67, 78, 143]
    (place,) = kept_places(manifest(spec, list(grid)), [size], kept)
    assert place is not None
    left, top, right, bottom = place["box"]
    across = ((np.arange(size[0]) + 0.5) / size[0] - left) / (right - left) * grid[1]
    down = ((np.arange(size[1]) + 0.5) / size[1] - top) / (bottom - top) * grid[0]
    columns, rows = np.floor(across), np.floor(down)
    clear = (abs(down - np.round(down)) > 1e-9)[:, None] & (abs(across - np.round(across)) > 1e-9)[None, :]
    assert clear.mean() > 0.8  # the others' centres lie on a border, to the last bit
    cells = [divmod(index, grid[1]) for index in place["kept"]]
    inside = np.any([(rows == row)[:, None] & (columns == column)[None, :] for row, column in cells], axis=0)
    colour = Image.new("RGB", size, (250, 30, 30))
    drawn = np.asarray(show_kept(colour, spec, grid, kept)).astype(int)
    np.testing.assert_array_equal((np.ptp(drawn, axis=2) > 0)[clear], inside[clear])


def test_several_pictures_and_those_without_one_grid() -> None:
    whole = manifest(ClipSpec(height=336, width=336), [2, 2])
    first, second = kept_places(whole, [(10, 10), (20, 30)], [[0, 3], [1]])
    assert first and second and first["kept"] == [0, 3] and second["kept"] == [1]
    tiles = InternvlSpec(height=8, width=8, min_tiles=1, max_tiles=9, image_height=16, image_width=16)
    assert tiles.views > 1
    assert kept_places(manifest(tiles, [2, 2]), [(10, 10)], [0]) == [None]
    assert kept_places(whole, [], []) == []
