"""The server's benchmark: every request is answered, both ways alike, by a real vtp-serve."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from vtp.bench.serving import main


def test_answers_of_several_clients_are_those_of_one(
    exported: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported("vispruner").folder
    flags = ["--clients", "1,3", "--requests", "2", "--max-new-tokens", "6", "--threads", "1", "--slots", "2"]
    assert main([str(bundle), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["clients"] for row in found["clients"]] == [1, 3]
    for row in found["clients"]:
        assert row["requests"] == 2 * row["clients"] and row["different"] == 0 and row["failed"] == []
        for way in ("in_turn", "at_once"):
            figures = row[way]
            assert figures["tokens_per_second"] == pytest.approx(6 * figures["answers_per_second"])
            assert 0 < figures["ttft_p50_ms"] <= figures["ttft_p95_ms"]


def test_a_bundle_that_cannot_be_served_is_one_line(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vtp.bench.serving: error: ")
