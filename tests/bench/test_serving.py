"""The server's benchmark: every request is answered, both ways alike, by a real vtp-serve."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from vtp.bench.compare.llamacpp.built import FOLDER, is_built
from vtp.bench.compare.llamacpp.serving import llama_server
from vtp.bench.serving import main
from vtp.engines import VtpError


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


@pytest.mark.skipif(not is_built(), reason="llama.cpp is not built: make llamacpp")
def test_llama_server_is_asked_the_same(
    exported: Callable[[str], Any], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    made = exported("vispruner")
    flags = ["--clients", "2", "--requests", "2", "--max-new-tokens", "6", "--threads", "1", "--slots", "2"]
    flags += ["--against", "llama-server", "--model", str(made.model), "--bits", "f32,f16"]
    assert main([str(made.folder), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"]["server"] == "llama-server" and found["against"]["bits"] == "f32,f16"
    (row,) = found["against"]["clients"]
    assert row["requests"] == 4 and row["failed"] == []
    for way in ("in_turn", "at_once"):
        assert row[way]["tokens_per_second"] == pytest.approx(6 * row[way]["answers_per_second"])


def test_a_comparison_that_cannot_be_is_one_line(
    exported: Callable[[str], Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    bundle = str(exported("vispruner").folder)
    for flags, message in (
        (["--against", "llama-server"], "--against llama-server wants --model DIR"),
        (["--bits", "q8_0,int4"], "--bits 'q8_0,int4' is not VISION,TEXT; VISION is one of f32, q8_0"),
    ):
        assert main([bundle, *flags]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with (
        pytest.raises(VtpError, match="llama-server is not built; run: make llamacpp"),
        llama_server(str(tmp_path), ("f32", "f16"), 1, 2, 64),
    ):
        pass


def test_a_bundle_that_cannot_be_served_is_one_line(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vtp.bench.serving: error: ")
