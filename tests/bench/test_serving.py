"""The server's benchmark: every request is answered, both ways alike, by a real vtp-serve."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from vtp.bench.compare.llamacpp.built import FOLDER, is_built
from vtp.bench.compare.llamacpp.serving import llama_server
from vtp.bench.serving import main
from vtp.engines import VtpError
from vtp.runtime.bundle.folder import open_bundle

from ..models.tiny_split import save_idefics3
from .smol_vocabulary import add_blank_line


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
            assert figures["prompt_tokens"] > 0


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


@pytest.mark.skipif(not is_built(), reason="llama.cpp is not built: make llamacpp")
def test_llama_server_cuts_pictures_as_the_bundle_does(
    once: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tiles and the whole, 4 tokens each; the chat template's blanks may differ by a token."""
    pytest.importorskip("gguf", reason="gguf is not installed")

    def write(folder: Any) -> None:
        save_idefics3(folder, kind="smolvlm")
        add_blank_line(folder)

    model = once.folder("smolvlm-served", write)
    bundle = once.bundle(model, method="none", image_size=(28, 56), max_length=128, verify="none")
    flags = ["--clients", "2", "--requests", "1", "--max-new-tokens", "6", "--threads", "1", "--slots", "2"]
    flags += ["--picture", "56x28", "--against", "llama-server", "--model", str(model), "--bits", "f32,f32"]
    assert main([str(bundle), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ours, theirs = (row["clients"][0]["in_turn"]["prompt_tokens"] for row in (found, found["against"]))
    assert abs(ours - theirs) <= 2 and ours > 3 * 4 + 6, (ours, theirs)
    assert found["against"]["clients"][0]["failed"] == []


def test_a_comparison_that_cannot_be_is_one_line(
    exported: Callable[[str], Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    bundle = str(exported("vispruner").folder)
    for flags, message in (
        (["--against", "llama-server"], "--against llama-server wants --model DIR"),
        (["--picture", "512"], "--picture '512' is not WxH, such as 1024x512"),
        (["--bits", "q8_0,int4"], "--bits 'q8_0,int4' is not VISION,TEXT; VISION is one of f32, q8_0"),
    ):
        assert main([bundle, *flags]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with (
        pytest.raises(VtpError, match="llama-server is not built; run: make llamacpp"),
        llama_server(str(tmp_path), ("f32", "f16"), 1, 2, open_bundle(bundle).manifest),
    ):
        pass


def test_a_bundle_that_cannot_be_served_is_one_line(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vtp.bench.serving: error: ")
