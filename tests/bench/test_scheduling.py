"""The benchmark of the scheduler: both ways answer the same, and the figures are of what ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from vtp.bench.scheduling import main


def test_figures_of_both_ways(exported: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(exported("vispruner").folder)
    flags = ["--clients", "1,3", "--requests", "2", "--max-new-tokens", "8", "--slots", "2", "--threads", "1"]
    assert main([folder, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["slots"], found["max_new_tokens"]) == ("ort-cpu", 2, 8)
    for row, clients in zip(found["clients"], (1, 3), strict=True):
        assert (row["clients"], row["requests"], row["different"]) == (clients, 2 * clients, 0)
        assert 1 <= row["mean_batch"] <= min(2, clients)
        for way in ("in_turn", "scheduled"):
            assert row[way]["tokens_per_second"] > 0
            assert 0 < row[way]["ttft_p50_ms"] <= row[way]["ttft_p95_ms"]


def test_a_table_for_people(exported: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(exported("vispruner").folder)
    flags = ["--clients", "2", "--requests", "1", "--max-new-tokens", "3", "--vision-feature-cache", "4"]
    assert main([folder, *flags]) == 0
    printed = capsys.readouterr().out
    assert "tok/s scheduled" in printed and "8 slots, answers of 3 tokens, features of 4 prompts" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clients", "0"], "--clients"),
        (["--clients", "1,,2"], "--clients"),
        (["--slots", "99", "--clients", "1"], "slots 99 is more than the 8 prompts"),
        (["--requests", "no"], "--requests"),
    ],
)
def test_bad_flags(
    exported: Callable[[str], Any], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([str(exported("vispruner").folder), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("vtp.bench.scheduling: error")
