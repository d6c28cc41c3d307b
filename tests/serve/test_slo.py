"""Fewer visual tokens instead of a longer queue: what is chosen, by whom, and that the answer says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError
from vtp.runtime.bundle.folder import set_calibration
from vtp.runtime.machine.conditions import conditions
from vtp.runtime.scheduler import Scheduler
from vtp.serve.cli import main
from vtp.serve.http.models import Models
from vtp.serve.slo import Slo, smoothed

from .client import Site, serving, shown, words

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8))
CONTENT = [shown(PICTURE), words("what ?")]
TIMES = {3: 20.0, 6: 40.0}


@pytest.fixture(scope="module")
def measured(exported: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose keep-counts 3 and 6 were measured here, with 20 and 40 ms."""
    folder = tmp_path_factory.mktemp("measured") / "bundle"
    shutil.copytree(exported("vispruner").folder, folder)
    tried = {str(keep): {"ttft_ms": ms} for keep, ms in TIMES.items()}
    known = {"engine": "ort-cpu", "conditions": conditions("ort-cpu", 1).to_json(), "tried": tried}
    set_calibration(folder, 3, known)
    return folder


@pytest.fixture
def busy(measured: Path) -> Iterator[Scheduler]:
    """One slot, and a queue that takes many."""
    with Scheduler.load(measured, engine="ort-cpu", threads=1, slots=1, queue=32) as scheduler:
        yield scheduler


@pytest.fixture
def aimed(busy: Scheduler) -> Iterator[Site]:
    models = Models(names=["tiny"])
    models.add("tiny", busy, Slo.of(busy, 45))
    models.loaded()
    with serving(models) as site:
        yield site


@pytest.mark.parametrize(
    ("wait", "keep", "expected", "met"),
    [(0.0, 6, 40.0, True), (0.005, 6, 45.0, True), (0.006, 3, 26.0, True), (0.1, 3, 120.0, False)],
)
def test_the_largest_that_is_in_time(wait: float, keep: int, expected: float, met: bool) -> None:
    chosen = Slo(45, TIMES).choose(wait)
    assert (chosen.keep_tokens, chosen.met) == (keep, met)
    assert chosen.expected_ms == pytest.approx(expected) and chosen.queue_ms == pytest.approx(wait * 1e3)


@pytest.mark.parametrize(
    ("measured", "times"),
    [
        ({3: 20.0, 6: 40.0}, {3: 20.0, 6: 40.0}),
        ({16: 135.0, 64: 117.0}, {16: 117.0, 64: 117.0}),
        ({1: 9.0, 2: 12.0, 3: 10.0, 4: 11.0}, {1: 9.0, 2: 10.0, 3: 10.0, 4: 11.0}),
    ],
)
def test_fewer_tokens_take_no_longer(measured: dict[int, float], times: dict[int, float]) -> None:
    assert smoothed(measured) == times
    assert Slo(1, smoothed({16: 135.0, 64: 117.0})).choose(0.0).keep_tokens == 64  # as fast, and more of them


def test_an_idle_server_keeps_many_and_a_busy_one_few(aimed: Site, busy: Scheduler) -> None:
    idle = aimed.chat(CONTENT, max_tokens=2).json["vtp"]
    assert idle["visual_tokens"]["after"] == 6
    assert idle["slo"] == {"aim_ms": 45, "expected_ms": 40, "queue_ms": 0, "met": True}
    waiting = [busy.submit(PICTURE, "what ?", max_new_tokens=60, keep_tokens=6) for _ in range(30)]
    loaded = aimed.chat(CONTENT, max_tokens=2).json["vtp"]
    assert loaded["visual_tokens"]["after"] == 3 and loaded["keep_tokens"] == 3
    assert loaded["slo"]["queue_ms"] > 5
    assert loaded["slo"]["expected_ms"] == pytest.approx(loaded["slo"]["queue_ms"] + 20, abs=0.01)
    assert all(ticket.result().finish_reason for ticket in waiting)
    text = aimed.send("/metrics").content.decode()
    for met in (idle["slo"]["met"], loaded["slo"]["met"]):
        assert f'vtp_slo_requests_total{{model="tiny",met="{str(met).lower()}"}}' in text


@pytest.mark.parametrize("fields", [{"vtp": {"keep_tokens": 3}}, {"vtp": {"budget_ms": 30}}])
def test_what_a_request_names_is_taken(aimed: Site, fields: dict[str, Any]) -> None:
    answer = aimed.chat(CONTENT, max_tokens=1, **fields).json["vtp"]
    assert answer["visual_tokens"]["after"] == 3 and "slo" not in answer
    low = aimed.chat([shown(PICTURE, detail="low"), words("what ?")], max_tokens=1).json["vtp"]
    assert low["visual_tokens"]["after"] == 3 and "slo" not in low


def test_never_below_the_least(busy: Scheduler) -> None:
    assert Slo.of(busy, 45, 4).choose(1.0).keep_tokens == 6
    with pytest.raises(UsageError, match="--min-keep 7 leaves none of the measured keep-counts: 3, 6"):
        Slo.of(busy, 45, 7)


def test_a_wait_is_expected_while_no_slot_is_free(busy: Scheduler) -> None:
    assert busy.expected_wait() == 0
    seconds = busy.submit(PICTURE, "what ?", max_new_tokens=60).result().timings.total / 1e3
    assert busy.expected_wait() == 0  # the slot is free again
    tickets = [busy.submit(PICTURE, "what ?", max_new_tokens=60) for _ in range(9)]
    expected = busy.expected_wait()
    assert 2 * seconds < expected < 30 * seconds  # about nine such, however the machine is loaded
    for ticket in tickets:
        ticket.cancel()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slo-ms", "0"], "--slo-ms 0 is not a time above 0"),
        (["--slo-ms", "-1"], "--slo-ms -1 is not a time above 0"),
        (["--slo-ms", "1e9"], "--slo-ms 1e+09 is not a time above 0, up to 3600000 ms"),
        (["--slo-ms", "45", "--min-keep", "0"], "--min-keep 0 is not a number of visual tokens"),
        (["--min-keep", "16"], "--min-keep belongs to --slo-ms"),
    ],
)
def test_flags_that_cannot_be_are_told_before_a_bundle_is_loaded(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["nowhere", "--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vtp-serve: error: {said}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slo-ms", "45"], "--slo-ms needs times measured on ort-cpu; this bundle is not calibrated"),
    ],
)
def test_an_aim_that_cannot_be_held_is_one_line(
    exported: Callable[[str], Any], capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    bundle = str(exported("vispruner").folder)
    assert main([bundle, "--engine", "ort-cpu", "--threads", "1", "--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vtp-serve: error: {said}") and error.count("\n") == 1
