"""`vtp.bench.compare.peers_report`: pages, aims and the fastest peer, from planted figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.bench.common.figures import ratio, spread
from vtp.bench.common.pairs import fastest_of, pair_of
from vtp.bench.compare import peers_report


def figures(median: float) -> dict[str, Any]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "runs": 10}


def turns(theirs: str, ours: str, ttft: tuple[float, float], tpot: tuple[float, float]) -> dict[str, Any]:
    """A pair of planted times: around the given milliseconds, the machine's slow moments in both."""
    slow = np.linspace(0.9, 1.1, 11)
    noise = np.random.default_rng(0).permutation(np.linspace(0.98, 1.02, 11))
    return pair_of(
        theirs,
        ours,
        {
            theirs: {"ttft": (ttft[0] * slow * noise).tolist(), "tpot": (tpot[0] * slow * noise).tolist()},
            ours: {"ttft": (ttft[1] * slow).tolist(), "tpot": (tpot[1] * slow).tolist()},
        },
    )


RESULTS: dict[str, Any] = {
    "format": peers_report.FORMAT,
    "model": "llava-ov-0.5b",
    "keep": 64,
    "rounds": 10,
    "tokens": 16,
    "threads": 2,
    "decoder_tokens": 80,
    "machine": {
        "processor": "a processor",
        "cores": 2,
        "memory_gb": 24.0,
        "system": "a system",
        "python": "3.11",
        "versions": {"onnxruntime": "1.31"},
        "time": "2026-11-21 12:00 UTC",
    },
    "peers": {
        "torch": {"peak": 4 * 10**9},
        "transformers-onnx": {
            "peak": 4 * 10**9,
            "equal": {"to": "torch", "tokens": 16, "of": 16, "difference": 2e-6, "close": True},
        },
        "vtp vispruner": {"peak": 3 * 10**9},
        "vtp vispruner int8": {"peak": 2 * 10**9},
        "genai": {"peak": 2 * 10**9},
        "vtp decoder": {"peak": 2 * 10**9},
    },
    # The machine was slower while torch ran, and slower still beside the int8 bundle.
    "pairs": [
        turns("torch", "vtp vispruner", (6000, 1200), (66, 60)),
        turns("transformers-onnx", "vtp vispruner", (1700, 1000), (33, 30)),
        turns("transformers-onnx", "vtp vispruner int8", (3400, 800), (66, 60)),
        turns("genai", "vtp decoder", (170, 170), (66, 60)),
    ],
    "missing": {"openvino": "pip install 'vtp-edge[peers]'"},
    "failed": {"torch-vispruner": "its process was killed by signal 9 (out of memory?)"},
    "stages": {},
}


def test_the_page_holds_peers_ratios_and_what_is_missing() -> None:
    text = peers_report.page(RESULTS)
    assert "`make bench`" in text and "a processor, 2 cores" in text
    assert 'BENCH="--rounds 5"' in peers_report.page({**RESULTS, "rounds": 5})
    assert "torch: 16 of 16 tokens, logits 2e-06" in text
    assert "## onnxruntime-genai" in text
    assert "not installed; `pip install 'vtp-edge[peers]'`" in text
    assert "PyTorch transformers with VisPruner: its process was killed by signal 9" in text


def lines_of(text: str) -> list[list[str]]:
    """The rows of every Markdown table, cell by cell."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def number(cell: str) -> float:
    return float(cell.split()[0])


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
    names = [row[0] for row in beside if row[0].startswith(("PyTorch", "transformers"))]
    times = [number(row[1]) for row in beside if row[0] in names]
    assert times == sorted(times, reverse=True) and names[-1] == peers_report.WHAT["transformers-onnx"]
    results["pairs"].append(turns("vtp none", "vtp vispruner", (1000, 900), (33, 30)))
    assert fastest_of(results) == "transformers-onnx"  # vtp itself is no peer
    assert fastest_of({"pairs": []}) is None


def test_a_pair_keeps_its_turns() -> None:
    pair = RESULTS["pairs"][0]
    for what in ("ttft", "tpot"):
        one, two = (pair["times"][name][what] for name in ("torch", "vtp vispruner"))
        assert pair["ms"]["torch"][what] == spread(one) and pair[what] == ratio(one, two)


def test_an_aim_is_met_by_the_lower_bound_alone() -> None:
    found = {what: met for what, _, _, met in peers_report.aims(RESULTS)}
    assert found == {
        "first token, fastest unpruned peer": False,  # its lower bound is below 1.75
        "first token, PyTorch unpruned": True,
        "first token, int8 encoder, fastest unpruned peer": True,
        "each further token, onnxruntime-genai": True,
    }
    assert "**missed**" in peers_report.page(RESULTS)


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
    found = {what: met for what, _, _, met in peers_report.aims(results)}
    assert found["pruner, vtp vispruner"] is False and found["peak memory"] is True
    assert (found["encoder"], found["prefill"], found["decoding"]) == (True, False, True)
    assert (found["host, each request"], found["host, each token"]) == (True, False)
    stages[0]["share"] = 1.72  # of what the machine gives at most: the most was measured wrong
    found = {what: met for what, _, _, met in peers_report.aims(results)}
    assert found["encoder"] is None and found["prefill"] is False


def test_the_report_is_written_between_the_readmes_marks(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("above\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nbelow\n")
    table = peers_report.write_report(RESULTS, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text == f"above\n<!-- bench: begin -->\n{table}\n<!-- bench: end -->\nbelow\n"
    assert "genai" not in table and "vtp, vispruner, int8 encoder | 3" in table
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


def test_the_page_and_the_readme_are_those_of_the_committed_figures() -> None:
    """Written by one command; before it ever ran, the README says so."""
    root = Path(__file__).parents[2]
    figures_file, readme = root / "docs/bench.json", (root / "README.md").read_text(encoding="utf-8")
    _, found, rest = readme.partition(peers_report.BEGIN)
    assert found
    table = rest.partition(peers_report.END)[0].strip()
    if not figures_file.exists():
        assert table == "Not measured yet: `make bench` writes this table."
        return
    results = json.loads(figures_file.read_text(encoding="utf-8"))
    if results.get("format") != peers_report.FORMAT:  # cannot be written again, and both pages say so
        assert peers_report.OUTDATED in table
        assert peers_report.OUTDATED in (root / "docs/bench.md").read_text(encoding="utf-8")
        return
    assert table == peers_report.summary(results)
    assert (root / "docs/bench.md").read_text(encoding="utf-8") == peers_report.page(results)
