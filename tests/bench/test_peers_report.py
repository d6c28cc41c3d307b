"""The report of `make bench`: equal precision first, ratios that the milliseconds beside them bear out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from vtp.bench.common.figures import ratio, spread
from vtp.bench.common.pairs import BOTH, TURNS, between, fastest_of, pair_of
from vtp.bench.compare import cells, peers_aims, peers_report

from .planted import RESULTS, figures, lines_of, number, turns


def test_the_page_holds_peers_ratios_and_what_is_missing() -> None:
    text = peers_report.page(RESULTS)
    assert "`make bench`" in text and "a processor, 2 cores" in text
    assert 'BENCH="--rounds 5"' in peers_report.page({**RESULTS, "rounds": 5})
    assert "llama.cpp, encoder f32, decoder f16, all tokens: not built; `make llamacpp`" in text
    assert (
        "Version 0.5.0-dev, from the source in llama-cpp-python 0.3.36" in text and "GGML_NATIVE=ON" in text
    )
    assert "torch: 3 of 16 tokens, logits 2e-01, cosine 0.980" in text
    assert "torch: 16 of 16 tokens, logits 2e-06" in text
    assert "## onnxruntime-genai" in text
    assert "not installed; `pip install 'vtp-edge[peers]'`" in text
    assert "PyTorch transformers with VisPruner: its process was killed by signal 9" in text
    assert "It says that it uses AVX2, AVX512." in text


@pytest.mark.parametrize("text", [peers_report.page(RESULTS), peers_report.summary(RESULTS)])
def test_every_ratio_is_the_quotient_of_the_milliseconds_beside_it(text: str) -> None:
    checked = 0
    for row in lines_of(text):
        for at in (1, 4):  # peer's ms, vtp's ms, ratio: of first tokens, of further ones
            if len(row) > at + 2 and row[at][:1].isdigit() and "(" in row[at + 2]:
                found = number(row[at]) / number(row[at + 1])
                assert number(row[at + 2]) == pytest.approx(found, rel=0.02), row
                checked += 1
    assert checked >= 3


def test_the_fastest_is_the_fastest_that_is_shown() -> None:
    """Also if a later pair of it was slower, and if another's ratio is smaller."""
    results = copy.deepcopy(RESULTS)
    results["peers"]["openvino"] = {"peak": 1}
    results["pairs"].insert(0, turns("openvino", "vtp vispruner", (1900, 1300), (33, 30)))
    assert fastest_of(results) == "transformers-onnx"
    beside = [row for row in lines_of(peers_report.summary(results)) if row[-1].endswith(")")]
    assert beside[1][0] == f"float32: {cells.NAMES['transformers-onnx']}"
    results["pairs"].append(turns("vtp none", "vtp vispruner", (1000, 900), (33, 30)))
    assert fastest_of(results) == "transformers-onnx"  # vtp itself is no peer
    assert fastest_of({"pairs": []}) is None


def test_a_pair_keeps_its_turns() -> None:
    pair = RESULTS["pairs"][0]
    for what in ("ttft", "tpot"):
        one, two = (pair["times"][name][what] for name in ("torch", "vtp vispruner"))
        assert pair["ms"]["torch"][what] == spread(one) and pair[what] == ratio(one, two)


def test_an_aim_is_met_by_the_lower_bound_alone() -> None:
    found = {what: met for what, _, _, met in peers_aims.aims(RESULTS)}
    assert found == {
        "first token, fastest unpruned peer, float32": False,  # its lower bound is below 1.75
        "first token, PyTorch unpruned, float32": True,
        "first token, vtp with all tokens, int8 encoder, int4 decoder": False,
        "first token, llama.cpp q8_0 and q4_0, as few bits": False,
        "first token, fastest other peer in as few bits": True,  # OpenVINO's, for llama.cpp is slower
        "each further token, llama.cpp q4_0": True,
        "each further token, onnxruntime-genai": True,
    }
    assert "**missed**" in peers_report.page(RESULTS)


def test_aims_of_a_tower_reduction_are_of_its_encoder_and_first_token() -> None:
    results = copy.deepcopy(RESULTS)
    cut, few = "vtp vispruner, tower ipcv:0.35", "vtp vispruner int8 int4, tower ipcv:0.35"
    pair = turns("vtp vispruner", cut, (1000, 520), (30, 30))
    pair["encoder"] = {"ratio": 2.0, "low": 1.9, "high": 2.1}
    results["pairs"] += [pair, turns("transformers-onnx", cut, (1700, 700), (33, 30))]
    results["pairs"].append(turns("llamacpp-q4_0", few, (4400, 500), (18, 17)))
    found = {what: met for what, _, _, met in peers_aims.aims(results) if "ipcv" in what}
    assert found == {
        "encoder, tower ipcv:0.35, vtp without it, float32": True,
        "first token, tower ipcv:0.35, fastest unpruned peer, float32": False,
        "first token, tower ipcv:0.35, llama.cpp q8_0 and q4_0": True,
    }
    results["towers"] = ["ipcv:0.35"]
    text = peers_report.page(results)
    assert "vtp, vispruner, tower ipcv:0.35, beside vtp, vispruner |" in text and "(tower.md)" in text


def test_an_encoder_is_compared_where_both_tell_of_it() -> None:
    times = {"a": {"ttft": [4.0], "tpot": [1.0], "encoder": [3.0]}, "b": {"ttft": [2.0], "tpot": [1.0]}}
    assert "encoder" not in pair_of("a", "b", times)
    times["b"]["encoder"] = [1.5]
    found = pair_of("a", "b", times)
    assert found["encoder"]["ratio"] == 2 and found["ms"]["a"]["encoder"]["median"] == 3


def test_aims_of_stages_are_read_from_the_bundles_own_figures() -> None:
    results = copy.deepcopy(RESULTS)
    stages = [
        {"stage": "vision_encoder", "ms": figures(900), "flops": 10, "share": 0.9},
        {"stage": "decoder", "ms": figures(90), "flops": 10, "share": 0.5},
    ]
    results["stages"]["vtp vispruner"] = {
        "parts": {"pruner": 20.0},
        "ttft_ms": figures(1000),
        "stages": stages,
        "decode": {"share": 0.95},
        "host_ms": {"request": figures(1.5), "token": figures(0.3)},
        "memory": {"over": 0.1},
    }
    found = {what: met for what, _, _, met in peers_aims.aims(results)}
    assert found["pruner, vtp vispruner"] is False and found["peak memory"] is True
    assert (found["encoder"], found["prefill"], found["decoding"]) == (True, False, True)
    assert (found["host, each request"], found["host, each token"]) == (True, False)
    stages[0]["share"] = 1.72  # of what the machine gives at most: the most was measured wrong
    found = {what: met for what, _, _, met in peers_aims.aims(results)}
    assert found["encoder"] is None and found["prefill"] is False


def test_the_report_is_written_between_the_readmes_marks(tmp_path: Path) -> None:
    won, marks = (
        "<!-- won: begin -->\n{}\n<!-- won: end -->\n",
        "<!-- bench: begin -->\n{}\n<!-- bench: end -->\n",
    )
    (tmp_path / "README.md").write_text(f"a\n{won.format('old')}b\n{marks.format('old')}c\n")
    table = peers_report.write_report(RESULTS, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text == f"a\n{won.format(peers_report.won(RESULTS))}b\n{marks.format(table)}c\n"
    assert (
        "genai" not in table
        and "float32: transformers' OnnxExporter on ONNX Runtime, all tokens | 1" in table
    )
    assert (tmp_path / "docs/bench.md").read_text() == peers_report.page(RESULTS)
    assert peers_report.with_table("no marks", table) == "no marks"


def test_figures_of_an_older_format_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    file = tmp_path / "docs/bench.json"
    (tmp_path / "pyproject.toml").write_text('name = "vtp-edge"\n')
    monkeypatch.chdir(tmp_path)
    file.write_text(json.dumps({**RESULTS, "format": 1}))
    assert peers_report.main() == 2 and "run: make bench" in capsys.readouterr().err
    assert list(file.parent.iterdir()) == [file]
    file.write_text(json.dumps(RESULTS))
    assert peers_report.main() == 0
    assert (tmp_path / "docs/bench.md").read_text() == peers_report.page(RESULTS)


def test_few_turns_have_a_range_and_no_interval() -> None:
    """Its bounds are those of single turns, and every table says so."""
    theirs, ours = [2.0, 6.0, 9.0], [1.0, 2.0, 3.0]
    assert between(theirs, ours) == {"ratio": 3.0, "low": 2.0, "high": 3.0}
    text = peers_report.page({**RESULTS, "rounds": TURNS - 1})
    assert "95 %" not in text and "times (range of the turns)" in text and "too few for an interval" in text
    assert "times (95 %)" in peers_report.page(RESULTS) and "range of" not in peers_report.page(RESULTS)


def test_the_headline_is_at_equal_precision() -> None:
    """A pruned bundle in few bits stands beside peers in as many, and nowhere beside one in float32."""
    few = [row for row in lines_of(peers_report.summary(RESULTS)) if row[0].startswith(BOTH.name)]
    assert [row[0].removeprefix(f"{BOTH.name}: ") for row in few] == [
        cells.NAMES["openvino-int4"],
        cells.NAMES["vtp none int8 int4"],
    ]
    text = peers_report.page(RESULTS)
    assert (
        text.index("## At equal precision") < text.index("## In float32") < text.index(f"## In {BOTH.name}")
    )
    for pair in RESULTS["pairs"]:
        assert (pair["ours"] == BOTH.ours) == (pair["theirs"] in BOTH.all_tokens)


def test_the_first_figures_are_the_tables_at_equal_precision() -> None:
    said = peers_report.won(RESULTS)
    rows = {row[0]: row[-1] for row in lines_of(peers_report.summary(RESULTS))}
    in_few = "OpenVINO (encoder in NNCF's int8, decoder with int4 weights)"
    for at, peer, words in (
        ("float32", "transformers-onnx", "In float32, transformers' OnnxExporter on ONNX Runtime"),
        (BOTH.name, "openvino-int4", f"With int8 encoder and int4 decoder, {in_few}"),
    ):
        times = rows[f"{at}: {cells.NAMES[peer]}"]
        assert f"{words} takes {times} times as long." in said
    whole = rows[f"float32: {cells.NAMES['vtp none']}"]
    assert f"vtp itself, with every token, takes {whole} times as long: that much is pruning." in said
    assert said.count("times as long") == 3 and "(`make bench`: `llava-ov-0.5b`, 2 threads" in said
    assert "95 % intervals" in said
    assert "least and the greatest" in peers_report.won({**RESULTS, "rounds": TURNS - 1})


def test_encoder_and_prompt_are_told_by_those_who_measure_them() -> None:
    rows = {row[0]: row[1:] for row in lines_of(peers_report.page(RESULTS).split("## Encoder and prompt")[1])}
    assert rows[cells.NAMES["llamacpp-q4_0"]] == ["2500 (2500 to 2500)", "1900 (1900 to 1900)"]
    assert rows[cells.NAMES["vtp none"]] == ["910 (905 to 930)", ""]


def test_the_page_and_the_readme_are_those_of_the_committed_figures() -> None:
    """Written by one command; before it ever ran, the README says so."""
    root = Path(__file__).parents[2]
    figures_file, readme = root / "docs/bench.json", (root / "README.md").read_text(encoding="utf-8")
    page = (root / "docs/bench.md").read_text(encoding="utf-8")
    _, found, rest = readme.partition(peers_report.BEGIN)
    assert found
    table = rest.partition(peers_report.END)[0].strip()
    if not figures_file.exists():
        assert table == "Not measured yet: `make bench` writes this table."
        return
    results = json.loads(figures_file.read_text(encoding="utf-8"))
    won = readme.partition(peers_report.WON[0])[2].partition(peers_report.WON[1])[0].strip()
    if results.get("format") != peers_report.FORMAT:  # cannot be written again, and both pages say so
        assert peers_report.OUTDATED in table
        told = dict(
            re.findall(r"(transformers' [\w ]+?)(?: takes)? (\d\.\d\d \(\d\.\d\d to \d\.\d\d\))", won)
        )
        rows = {row[0].removesuffix(", all tokens"): row[-1] for row in lines_of(table)}
        fastest = cells.called(results["fastest"]).removesuffix(", all tokens")
        assert fastest in told and told == {name: rows[name] for name in told}
        assert peers_report.OUTDATED in page
        return
    assert (table, won) == (peers_report.summary(results), peers_report.won(results))
    assert page == peers_report.page(results)
