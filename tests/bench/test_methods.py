"""`make methods`: questions, timing, resuming, and a report that says what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vtp.bench.studies.methods import asked, command
from vtp.bench.studies.methods import report as methods_report
from vtp.bench.studies.methods.asked import Cell
from vtp.engines import VtpError
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.scenes import model_dir
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
    names = command._names("all")[1:]
    assert held == {(name, keep) for name in names for keep in (192, 128, 64, 32, 16)}


def test_the_report_goes_to_the_checkout() -> None:
    """Modules are reached through the links in vtp/, which are no part of the path to docs/."""
    assert (command.ROOT / "pyproject.toml").is_file() and methods_report.ROOT == command.ROOT


def test_questions_are_answered_at_every_keep_count(exported: Any) -> None:
    """And a row's operations are its graphs': of the whole tower, and of a decoder that reads K tokens."""
    items = list(held_out(6))
    folder = exported("vispruner").folder
    found = asked.ask("vispruner", [Cell(folder, 6, 6), Cell(folder, 3, 3)], items, 1)
    assert {column: len(ones) for column, ones in found["right"].items()} == {"6": 6, "3": 6}
    whole = asked.ask("none", [Cell(exported("none").folder, 16, 16)], items[:2], 1)
    assert {column: len(ones) for column, ones in whole["right"].items()} == {"16": 2, "blank": 2}
    work = {**found["gflop"], **whole["gflop"]}
    assert all(work[keep]["tower"] == pytest.approx(work["16"]["tower"], rel=0.2) for keep in ("3", "6"))
    assert 0 < work["3"]["decoder"] < work["6"]["decoder"] < work["16"]["decoder"]


def test_right_answers_are_counted(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(held_out(4))
    truths = iter([items[0].answer, "", f" {items[1].answer} ", items[2].answer[:-1] + "?"])

    class Oracle:
        def generate(self, *_: Any, **__: Any) -> Any:
            return type("Result", (), {"text": next(truths)})

    some = [items[0], items[0], items[1], items[2]]
    assert [asked._right(Oracle(), item, 3) for item in some] == [1, 0, 1, 0]  # type: ignore[arg-type]


def test_timing_covers_every_bundle_and_keep_count(exported: Any) -> None:
    pruned, whole = (exported(name).folder for name in ("vispruner", "none"))
    rows = {"vispruner": [Cell(pruned, keep, keep) for keep in (3, 6)], "none": [Cell(whole, 16, 16)]}
    times = asked.time_to_first_token(rows, next(iter(held_out(1))), 2)
    assert {name: set(row) for name, row in times.items()} == {"vispruner": {"3", "6"}, "none": {"16"}}
    assert times["none"]["16"]["pruner"] == 0
    assert 0 < times["vispruner"]["3"]["pruner"] < times["vispruner"]["3"]["ttft"]


def test_answers_are_resumed_only_for_the_same_questions(tmp_path: Path) -> None:
    wanted = {"seed": 1, "questions": 2, "keep": [3]}
    file, cells = tmp_path / "uniform.json", [Cell(tmp_path / "uniform", 3, 3)]
    assert asked.held(file, cells, wanted) is None
    (tmp_path / "uniform").mkdir()
    asked.write(file, {**wanted, "right": {"3": [1, 0]}})
    assert asked.held(file, cells, wanted) == {**wanted, "right": {"3": [1, 0]}}
    assert asked.held(file, cells, {**wanted, "seed": 2}) is None
    assert asked.held(file, [*cells, Cell(tmp_path / "other", 2, 2)], wanted) is None


def test_the_smaller_picture_has_a_bundle_for_every_keep_count(tmp_path: Path) -> None:
    """Of the built-in model: squares of its 14 pixel patches, the nearest to K; the row says how many."""
    cells = asked.cells_of("downsample", [192, 128, 64, 32, 16], tmp_path)
    assert [(cell.column, cell.tokens, cell.folder.name) for cell in cells] == [
        (192, 196, "196"),
        (128, 121, "154"),
        (64, 64, "112"),
        (32, 36, "84"),
        (16, 16, "56"),
    ]
    assert asked.cells_of("none", [64], tmp_path) == [Cell(tmp_path / "none", 576, 576)]
    assert asked.cells_of("focal", [64, 16], tmp_path) == [
        Cell(tmp_path / "focal", keep, keep) for keep in (64, 16)
    ]


@pytest.mark.slow
def test_the_smaller_picture_is_asked_unpruned(tmp_path: Path) -> None:
    cells = asked.cells_of("downsample", [16], tmp_path)
    asked.export_cells("downsample", cells)
    manifest = open_bundle(cells[0].folder).manifest
    assert manifest.method.name == "none" and manifest.visual.keep == [16] == [cells[0].tokens]
    assert manifest.tower is not None and manifest.tower.options == {"size": 56}
    assert manifest.model.name == model_dir().name
    items = list(held_out(8))
    found = asked.ask("downsample", cells, items, 1)
    with Pipeline.load(cells[0].folder, threads=1) as pipe:
        texts = [pipe.generate(item.image, item.prompt, max_new_tokens=12).text for item in items]
    assert found["right"] == {
        "16": [int(text.strip() == item.answer) for text, item in zip(texts, items, strict=True)]
    }
    # Of 17 rows with CLS instead of 577: less than a thirtieth of the tower's work.
    assert found["gflop"]["16"]["tower"] < 2.96 / 30


# -- answers kept, and what is made of them ------------------------------------------------------------------


def with_answers() -> dict[str, Any]:
    """Two methods and the smaller picture, eight questions about four pictures, one keep-count."""
    rights = {
        "none": [1, 1, 1, 1, 1, 1, 1, 1],
        "ahead": [1, 1, 1, 1, 1, 1, 1, 0],
        "random": [0, 0, 0, 1, 0, 0, 0, 1],
        "downsample": [0, 1, 0, 0, 0, 1, 0, 0],
    }
    rows = [
        {
            "method": name,
            "site": {"none": "-", "downsample": "--tower"}.get(name, "vision"),
            "keep": 16 if name == "none" else 5,
            "tokens": {"none": 16, "downsample": 4}.get(name, 5),
            "right": sum(right),
            "kinds": {"shape": [sum(right[::2]), 4], "count": [sum(right[1::2]), 4]},
            "answers": command.packed(right),
            "gflop": {"tower": 2.5, "decoder": 0.25},
            **({} if name == "downsample" else {"ttft": 40.0, "pruner": 1.25}),
        }
        for name, right in rights.items()
    ]
    return {"questions": 8, "seed": 1, "rounds": 3, "cores": 2, "machine": "test", "rows": rows}


def test_answers_come_back_as_they_were() -> None:
    right = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1]
    assert command.packed(right) == "9ac0"
    assert methods_report.unpacked("9ac0", 10).tolist() == right


def test_a_row_is_held_against_another_picture_by_picture() -> None:
    rows = {row["method"]: row for row in with_answers()["rows"]}
    assert methods_report.ahead(rows["ahead"], rows["ahead"], 8) == "+0.0 (+0.0 to +0.0)"
    # Right more often by 2, 1, 1 (a picture's two questions), then 2 - ... : five of eight questions.
    assert methods_report.ahead(rows["ahead"], rows["downsample"], 8).startswith("+62.5 (")
    # Both questions of every picture differ alike: no picture drawn changes the mean.
    mine, theirs = (
        {"answers": command.packed(ones), "kinds": {"a": 0, "b": 0}} for ones in ([1] * 8, [0, 1] * 4)
    )
    assert methods_report.ahead(mine, theirs, 8) == "+50.0 (+50.0 to +50.0)"


def test_the_page_says_what_the_smaller_picture_is(tmp_path: Path) -> None:
    page = methods_report.page(with_answers())
    assert "or the nearest number that is a square of patches: 4." in page
    assert "| downsample | 25.0 (7.1–59.1), 4 tokens |" in page
    assert "`downsample` was asked later (`--add`)" in page and "and has no times." in page
    against = page.partition("## Against a smaller picture, points")[2].partition("\n## ")[0]
    assert "| method | K = 5, 4 tokens |" in against and "| ahead | +62.5 (" in against
    chance = page.partition("## Against a random choice, points")[2].partition("\n## ")[0]
    assert "| ahead | +62.5 (" in chance and "| downsample | +0.0 (" in chance
    assert "| ahead | 2.50 + 0.25 |" in page.partition("## Operations")[2]
    assert "| downsample | --tower | 25.0 (4) | 2.50 + 0.25 |  |" in methods_report.summary(with_answers())


def test_a_method_without_answers_is_named_and_left_out() -> None:
    results = with_answers()
    del next(row for row in results["rows"] if row["method"] == "ahead")["answers"]
    page = methods_report.page(results)
    against = page.partition("## Against a smaller picture, points")[2].partition("\n## ")[0]
    assert "| ahead |" not in against and "Not in it, for their answers were not kept: `ahead`." in against
    assert "## Against" not in methods_report.page(globals()["results"]())


def test_rows_are_added_to_those_of_an_earlier_run(capsys: pytest.CaptureFixture[str]) -> None:
    page, new = with_answers(), with_answers()
    page["rows"] = [
        {**row, "right": row["right"] - (row["method"] == "random")}
        for row in page["rows"]
        if row["method"] != "downsample"
    ]
    new["rows"] = [row for row in new["rows"] if row["method"] != "ahead"]
    new["cores"] = 64
    for row in new["rows"]:
        row.pop("ttft", None), row.pop("pruner", None)
    found = command.added(new, page)
    assert found["again"] == ["random"]
    assert "`random` was asked again then, with the answers of that run and the times" in methods_report.page(
        found
    )
    assert found["cores"] == 2 and [row["method"] for row in found["rows"]] == [
        *("none", "ahead", "random", "downsample")
    ]
    rows = {row["method"]: row for row in found["rows"]}
    assert (
        rows["random"]["ttft"] == 40.0 and rows["random"]["right"] == 2 and "ttft" not in rows["downsample"]
    )
    assert "random at 5: 2 right, 1 in docs/methods.json" in capsys.readouterr().out
    page["rows"][0]["right"] = 7
    with pytest.raises(VtpError, match=r"none at 16: 8 right, 7 in docs/methods\.json, so that was another"):
        command.added(new, page)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--count", "9"], "--count is 9, and the rows of .* have 8"),
        (["--count", "8", "--keep", "4"], r"--keep is \[4\], and the rows of .* have \[5\]"),
        (["--count", "8", "--seed", "3"], "--seed is 3, and the rows"),
        (["--out", "nowhere"], "docs/methods.json is not there; run without --add"),
    ],
)
def test_another_exam_adds_nothing(
    tmp_path: Path, flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/methods.json").write_text(json.dumps(with_answers()))
    asked_for = ["--add", "--seed", "1", "--keep", "5", "--out", str(tmp_path), "--work", str(tmp_path / "w")]
    assert command.main([*asked_for, *flags]) == 2
    assert re.search(problem, capsys.readouterr().err) and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["--methods", "vispruner,nothere"], "nothere"), (["--keep", "x"], "keep-tokens")],
)
def test_bad_input_is_one_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(problem, said) and "\n" not in said
