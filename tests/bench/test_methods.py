"""`make methods`: questions, timing, resuming, and a report that says what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vtp.bench.studies import methods, methods_report
from vtp.scenes.exam import held_out

ROOT = Path(__file__).parents[2]


def results(**changes: Any) -> dict[str, Any]:
    """Two methods at three keep-counts, and every token kept."""
    rights = {"none": {576: 8, "blank": 1}, "worse": {64: 5, 32: 3, 16: 1}, "better": {64: 7, 32: 6, 16: 4}}
    rows = [
        {
            "method": method,
            "site": "-" if method == "none" else "vision",
            "keep": keep,
            "right": right,
            "kinds": {"shape": [right // 2, 4], "count": [right - right // 2, 4]},
            **({} if keep == "blank" else {"ttft": 40.0 + right, "pruner": 1.25}),
        }
        for method, kept in rights.items()
        for keep, right in kept.items()
    ]
    return {"questions": 8, "seed": 1, "rounds": 3, "cores": 2, "machine": "test", "rows": rows, **changes}


def test_the_report_ranks_and_counts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'vtp-edge[bench]'")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/methods.md"
    page.write_text(f"a\n{methods_report.BEGIN}\nold\n{methods_report.END}\nz\n")
    methods_report.write_report(results(), tmp_path)
    text = page.read_text()
    assert text.startswith("a\n") and text.endswith("\nz\n") and "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == [
        "method",
        "---",
        "none (all 576)",
        "better",
        "worse",
    ]
    assert "| better | vision | 87.5 | 75.0 | 50.0 | 46 |" in lines
    assert len({line.count("|") for line in lines}) == 1
    measured = (tmp_path / "docs/measured.md").read_text()
    assert "| worse | 62.5 (30.6–86.3) | 37.5 (13.7–69.4) | 12.5 (2.2–47.1) |" in measured
    assert "a grey picture: 12.5" in measured and "| better | 47 (1.2) | 46 (1.2) | 44 (1.2) |" in measured
    assert (tmp_path / "docs/methods.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "docs/methods.json").read_text()) == results()


def test_a_page_without_marks_is_left_alone() -> None:
    assert methods_report.with_table("no marks", "| table |") == "no marks"


def test_committed_tables_come_from_the_committed_figures() -> None:
    measured = json.loads((ROOT / "docs/methods.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/measured.md").read_text(encoding="utf-8") == methods_report.page(measured)
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert methods_report.with_table(page, methods_report.summary(measured)) == page
    assert methods_report.BEGIN in page
    assert measured["questions"] >= 500


def test_committed_figures_hold_every_method() -> None:
    measured = json.loads((ROOT / "docs/methods.json").read_text(encoding="utf-8"))
    held = {(row["method"], row["keep"]) for row in measured["rows"]} - {("none", 576), ("none", "blank")}
    names = methods._names("all")[1:]
    assert held == {(name, keep) for name in names for keep in (192, 128, 64, 32, 16)}


def test_the_report_goes_to_the_checkout() -> None:
    """Modules are reached through the links in vtp/, which are no part of the path to docs/."""
    assert (methods.ROOT / "pyproject.toml").is_file() and methods_report.ROOT == methods.ROOT


def test_questions_are_answered_at_every_keep_count(exported: Any) -> None:
    items = list(held_out(6))
    right = methods.take_exam(exported("vispruner").folder, items)
    assert {keep: len(ones) for keep, ones in right.items()} == {"3": 6, "6": 6}
    whole = methods.take_exam(exported("none").folder, items[:2])
    assert {keep: len(ones) for keep, ones in whole.items()} == {"16": 2, "blank": 2}


def test_right_answers_are_counted(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(held_out(4))
    truths = iter([items[0].answer, "", f" {items[1].answer} ", items[2].answer[:-1] + "?"])

    class Oracle:
        def generate(self, *_: Any, **__: Any) -> Any:
            return type("Result", (), {"text": next(truths)})

    asked = [items[0], items[0], items[1], items[2]]
    assert [methods._right(Oracle(), item, 3) for item in asked] == [1, 0, 1, 0]  # type: ignore[arg-type]


def test_timing_covers_every_bundle_and_keep_count(exported: Any) -> None:
    bundles = {name: exported(name).folder for name in ("vispruner", "none")}
    times = methods.time_to_first_token(bundles, next(iter(held_out(1))), 2)
    assert {name: set(row) for name, row in times.items()} == {"vispruner": {"3", "6"}, "none": {"16"}}
    assert times["none"]["16"]["pruner"] == 0
    assert 0 < times["vispruner"]["3"]["pruner"] < times["vispruner"]["3"]["ttft"]


def test_answers_are_resumed_only_for_the_same_questions(tmp_path: Path) -> None:
    wanted = {"seed": 1, "questions": 2, "keep": [3]}
    assert methods._held(tmp_path, "uniform", wanted) is None
    (tmp_path / "uniform").mkdir()
    methods._write(tmp_path / "uniform.json", {**wanted, "right": {"3": [1, 0]}})
    assert methods._held(tmp_path, "uniform", wanted) == {**wanted, "right": {"3": [1, 0]}}
    assert methods._held(tmp_path, "uniform", {**wanted, "seed": 2}) is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["--methods", "vispruner,nothere"], "nothere"), (["--keep", "x"], "keep-tokens")],
)
def test_bad_input_is_one_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert methods.main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(problem, said) and "\n" not in said
