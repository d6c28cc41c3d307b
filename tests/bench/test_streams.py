"""What stream reuse saves: made streams are played on a tiny bundle, whole, reused and behind a gate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from vtp.bench.studies import streams
from vtp.bench.studies.streams import Seen, Way, play, render
from vtp.bench.studies.watching import stream
from vtp.runtime import Pipeline


@pytest.mark.slow
def test_a_stream_is_played_whole_reused_and_behind_a_gate(exported: Callable[[str], Any]) -> None:
    folder = exported("stc").folder
    with (
        Pipeline.load(folder, threads=1) as plain,
        Pipeline.load(folder, threads=1, stream_reuse=True) as pipe,
    ):
        ways = [Way("whole", plain, None), Way("reused", pipe, None), Way("gated", pipe, 0.999)]
        whole, reused, gated = (list(play(way, islice(stream(0), 6))) for way in ways)
    assert [one.rows for one in whole] == [1] * 6 and all(one.tower_ms > 0 for one in whole)
    assert [one.rows == 1 for one in reused] == [True, False, False, False, True, False]
    assert [one.asked for one in gated] == [True] + [False] * 5 and gated[0].rows == 1
    assert all(one.tower_ms == 0 < one.ms for one in gated[1:])


def test_the_table_counts_each_phase() -> None:
    drift = [Seen("drift", True, 1.0, True, 8.0, 20.0), Seen("drift", True, 0.25, False, 2.0, 10.0)]
    still = [
        Seen("cut and still", True, 1.0, True, 8.0, 20.0),
        Seen("cut and still", False, 0.0, True, 0.0, 1.0),
    ]
    assert render({"both": drift + still}).splitlines()[2] == (
        "| both | 100%, 50%, 50.0% | 5.0, 15.0 | 50%, 50%, 100.0% | 4.0, 10.5 |"
    )


def test_a_bundle_that_reuses_nothing_is_refused(
    exported: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert streams.main([str(exported("vispruner").folder), "--scenes", "1"]) == 2
    said = capsys.readouterr().err.strip()
    assert "makes no use of earlier pictures" in said and "\n" not in said
