"""The trials that chose focal: the page quotes its rules by name, and they compute what they say."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vtp.bench.studies import paired, trials
from vtp.export.exporter import Request, export
from vtp.scenes.exam import by_picture, held_out

ROOT = Path(__file__).parents[2]
RULES = trials.rules()


@pytest.fixture(scope="module")
def cues() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, trials.COUNT, 24, generator=generator) + 1
    scores = [torch.randn(2, trials.COUNT, generator=generator).softmax(1) for _ in range(3)]
    names = ("attention_scores", "largest", "received")
    return {"image_features": rows, "image_embeds": rows[..., :16], **dict(zip(names, scores, strict=True))}


def test_the_page_has_one_line_for_each_rule() -> None:
    page = (ROOT / "docs/focal.md").read_text(encoding="utf-8").partition("## What was tried")[2]
    lines = re.findall(r"^\| (.+?) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", page, re.MULTILINE)
    assert lines[1:] == list(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_keeps_k_tokens_in_order(name: str, cues: dict[str, Tensor]) -> None:
    kept = RULES[name][0](cues, 5)
    assert kept.shape == (2, 5) and bool((kept[:, 1:] > kept[:, :-1]).all())
    assert int(kept.min()) >= 0 and int(kept.max()) < trials.COUNT


def test_focal_by_its_parts_is_focal(cues: dict[str, Tensor]) -> None:
    """The variants change one piece of this sum of parts, so the sum must be the method itself."""
    width = math.sqrt(trials.COUNT / 16)
    parts = trials.dim(cues["attention_scores"], trials.half(cues) * trials.near(width), 16)
    assert parts.tolist() == RULES["focal"][0](cues, 16).tolist()


def test_dpp_picks_the_largest_determinant(cues: dict[str, Tensor]) -> None:
    quality, likeness = cues["attention_scores"] ** 0.5, trials.half(cues)
    kernel = (quality[:, :, None] * likeness * quality[:, None, :])[0].double()
    picks: list[int] = []
    for _ in range(3):
        worth = [
            -math.inf if one in picks else float(torch.det(kernel[[*picks, one]][:, [*picks, one]]))
            for one in range(trials.COUNT)
        ]
        picks.append(max(range(trials.COUNT), key=worth.__getitem__))
    assert trials.dpp(quality, likeness, 3)[0].tolist() == sorted(picks)


def test_cover_adds_the_most_coverage(cues: dict[str, Tensor]) -> None:
    likeness, wanted = trials.cosines(cues).clamp_min(0), cues["attention_scores"]
    covered, picks = torch.zeros(trials.COUNT), list[int]()
    for _ in range(3):
        gain = ((likeness[0] - covered).clamp_min(0) * wanted[0]).sum(1)
        gain[picks] = -1
        picks.append(int(gain.argmax()))
        covered = torch.maximum(covered, likeness[0, picks[-1]])
    assert trials.cover(likeness, 3, wanted=wanted)[0].tolist() == sorted(picks)


def test_bad_keep_counts_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert trials.main(["--keep", "x"]) == 2
    said = capsys.readouterr().err.strip()
    assert "keep-tokens 'x'" in said and "\n" not in said


@pytest.mark.slow
def test_the_short_way_judges_as_generation_does(tmp_path: Path) -> None:
    items = list(held_out(12, 777))
    bundle = export(Request(tmp_path / "b", method="focal", keep_tokens="16", verify="none"))
    whole = paired.take_exam(bundle.folder, items, [16], threads=1)[0].tolist()
    ruler = trials.Ruler()
    with torch.no_grad():
        rate = ruler.rate(ruler.read(12, 777), RULES["focal"][0], 16, original=False)
    assert len(list(by_picture(items))) == 3 and rate == sum(whole) / 12
