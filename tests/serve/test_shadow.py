"""A share of the requests is answered again by another bundle: what is counted and written differs."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vtp.calib.data import load_samples
from vtp.runtime import Pipeline
from vtp.runtime.scheduler import Scheduler
from vtp.serve import shadow as shadow_module
from vtp.serve.cli import main
from vtp.serve.http.models import Models
from vtp.serve.shadow import Files, Shadow, first_difference, picture_hash

from .client import Site, serving, shown, wait_until, words

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for seed in range(6)
]
MANY = 12  # tokens of an answer


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "log.jsonl", tmp_path / "kept")


@pytest.fixture
def site(exported: Callable[[str], Any], files: Files) -> Iterator[Site]:
    """A server whose every answer is compared with the unpruned bundle's."""
    models = Models(names=["tiny"])
    served = Scheduler.load(exported("vispruner").folder, threads=1, slots=2, queue=4)
    other = Scheduler.load(exported("none").folder, threads=1, slots=1, queue=0)
    models.add("tiny", served, shadow=Shadow(other, lambda: models.idle, 1.0, files))
    models.loaded()
    with serving(models) as running:
        yield running
    models.close()


def counts(site: Site) -> dict[str, float]:
    """Outcome -> answers, from the metrics."""
    text = site.send("/metrics").content.decode()
    (family,) = [one for one in text_string_to_metric_families(text) if one.name == "vtp_shadow_answers"]
    return {sample.labels["outcome"]: sample.value for sample in family.samples}


def compared(site: Site, number: int) -> bool:
    found = counts(site)
    return sum(found.values()) == number


def test_disagreements_are_counted_and_written(
    site: Site, exported: Callable[[str], Any], files: Files
) -> None:
    for place, picture in enumerate(PICTURES):
        site.chat([shown(picture), words(f"what is it ? {place}")], max_tokens=MANY, vtp={"keep_tokens": 3})
    wait_until(lambda: compared(site, len(PICTURES)))
    expected, texts = [], []
    with (
        Pipeline.load(exported("vispruner").folder, threads=1) as pruned,
        Pipeline.load(exported("none").folder, threads=1) as whole,
    ):
        for place, picture in enumerate(PICTURES):
            asked: dict[str, Any] = {"prompt": f"what is it ? {place}", "max_new_tokens": MANY}
            one, other = pruned.generate(picture, keep_tokens=3, **asked), whole.generate(picture, **asked)
            texts.append((one.text.strip(), other.text.strip()))
            if texts[-1][0] != texts[-1][1]:
                expected.append(
                    (asked["prompt"], texts[-1], first_difference(one.token_ids, other.token_ids))
                )
    assert expected, "the two bundles agree about everything: this test shows nothing"
    rows = [json.loads(row) for row in files.log.read_text().splitlines()]
    assert [
        (row["prompt"], (row["served"], row["answer"]), row["first_difference"]) for row in rows
    ] == expected
    assert counts(site) == {
        "agreed": len(PICTURES) - len(expected),
        "differed": len(expected),
        "skipped": 0,
        "failed": 0,
    }
    assert stat.S_IMODE(files.log.stat().st_mode) == 0o600
    samples = load_samples(files.log)
    assert [sample.prompt for sample in samples] == [row["prompt"] for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        with Image.open(sample.image) as kept:
            assert [picture_hash(kept)] == row["image_sha256"]
        assert sample.answers == (row["answer"],) and row["visual_tokens"] == {"before": 16, "after": 3}


def test_pictures_do_not_fill_the_disk(site: Site, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a bound only their hashes are written."""
    monkeypatch.setattr(shadow_module, "_LARGEST_PICTURES", 1)
    for place, picture in enumerate(PICTURES):
        site.chat([shown(picture), words(f"what is it ? {place}")], max_tokens=MANY, vtp={"keep_tokens": 3})
    wait_until(lambda: compared(site, len(PICTURES)))
    rows = [json.loads(row) for row in files.log.read_text().splitlines()]
    assert files.pictures is not None and len(rows) > 1
    assert [row["image"] is None for row in rows] == [False] + [True] * (len(rows) - 1)
    assert len(list(files.pictures.iterdir())) == 1 and all(len(row["image_sha256"]) == 1 for row in rows)


def test_sampled_answers_are_not_compared(site: Site) -> None:
    site.chat([shown(PICTURES[0]), words("what ?")], max_tokens=2, temperature=1.0, seed=3)
    site.chat([shown(PICTURES[0]), words("what ?")], max_tokens=2)
    wait_until(lambda: compared(site, 1))
    time.sleep(0.1)
    assert compared(site, 1)


def test_requests_come_first(exported: Callable[[str], Any], files: Files) -> None:
    """While somebody waits, nothing is compared; the oldest exchanges go when too many wait."""
    models, busy = Models(names=["tiny"]), [True]
    served = Scheduler.load(exported("vispruner").folder, threads=1, slots=1, queue=4)
    other = Scheduler.load(exported("none").folder, threads=1, slots=1, queue=0)
    models.add("tiny", served, shadow=Shadow(other, lambda: not busy[0], 1.0, files))
    models.loaded()
    with serving(models) as site:
        for _ in range(20):
            site.chat([shown(PICTURES[0]), words("what ?")], max_tokens=1)
        assert counts(site) == {"agreed": 0, "differed": 0, "skipped": 4, "failed": 0}
        busy[0] = False
        wait_until(lambda: compared(site, 20))
        assert counts(site)["skipped"] == 4
    models.close()


def test_a_share_is_chosen_by_lot(exported: Callable[[str], Any], files: Files) -> None:
    with Scheduler.load(exported("none").folder, threads=1, slots=1, queue=0) as other:
        shadow = Shadow(other, lambda: True, 0.1, files, seed=7)
        chosen = sum(shadow.wants({}) for _ in range(4000))
        assert 320 < chosen < 480  # 400, and four standard deviations of 19
        assert not any(shadow.wants({"temperature": 0.5}) for _ in range(200))
        shadow.close()


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([2], [1], 0)],
)
def test_the_first_difference(one: list[int], other: list[int], place: int | None) -> None:
    assert first_difference(one, other) == place


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shadow", "x", "--shadow-rate", "0"], "--shadow-rate 0 is not a share above 0"),
        (["--shadow", "x", "--shadow-rate", "1.5"], "--shadow-rate 1.5 is not a share above 0"),
        (["--shadow-keep", "x"], "--shadow-log and --shadow-keep need --shadow BUNDLE"),
        (["--shadow", "x", "--shadow-keep", __file__], f"--shadow-keep '{__file__}' is not a folder"),
        (
            ["--shadow", "x", "--shadow-log", "/nowhere/log.jsonl"],
            "--shadow-log '/nowhere/log.jsonl' is not a",
        ),
        (["b", "--shadow", "x"], "--shadow compares one bundle with another, and 2 are served"),
    ],
)
def test_flags_that_cannot_be_are_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["a", *flags, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vtp-serve: error: {said}") and error.count("\n") == 1
