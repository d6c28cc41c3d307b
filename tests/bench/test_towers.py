"""Methods behind tower reductions: the table's arithmetic, and a run that goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.bench.studies import towers
from vtp.bench.studies.towers import Taken
from vtp.scenes.exam import EXAMS, Item, held_out

READER = EXAMS["reader"]


def items() -> list[Item]:
    """Two pictures' questions, one of each kind."""
    return list(held_out(2 * len(READER), kinds=READER))


def taken(method: str, tower: str, wrong: dict[int, list[int]], gflop: float) -> Taken:
    """Right answers at two keep-counts (of none: at one), but for the questions in `wrong`, by keep-count."""
    right = np.ones((1 if method == "none" else 2, 2 * len(READER)), bool)
    for place, questions in wrong.items():
        right[place, questions] = False
    return Taken(method, tower, gflop, right)


def test_differences_are_to_the_same_methods_behind_the_whole_tower() -> None:
    sign = READER.index("sign")
    everything = [
        taken("none", "none", {}, 4.0),
        taken("one", "none", {1: [0]}, 4.0),
        taken("two", "none", {}, 4.0),
        taken("none", "ipcv:0.35", {0: [sign]}, 2.5),
        taken("one", "ipcv:0.35", {0: [0, sign, sign + 6], 1: [0, sign]}, 2.5),
        taken("two", "ipcv:0.35", {0: [sign]}, 2.5),
    ]
    text = towers.markdown({(one.method, one.tower): one for one in everything}, items(), [9, 4])
    rows = {
        tuple(cells[1:4]): cells[4:6] for line in text.splitlines() if len(cells := line.split(" | ")) > 8
    }
    rows = {key: value for key, value in rows.items() if key[1] in ("all", "9", "4")}
    assert rows["4.00", "all", "100.0"][0] == ""
    assert rows["2.50", "all", "91.7"][0].startswith("-8.3 (")
    # At 9 kept, one is wrong on three questions of twelve and two on one: two of twelve on the mean.
    assert rows["2.50", "9", "83.3"][0].startswith("-16.7 (")
    # At 4 kept, one loses the sign alone, for it was wrong on question 0 before.
    assert rows["4.00", "4", "95.8"][0] == "" and rows["2.50", "4", "91.7"][0].startswith("-4.2 (")
    signs = text.partition("### Every method, sign")[2].partition("###")[0]
    assert (
        "| one | 100.0 | 100.0 | 0.0 | 50.0 |" in signs and "| two | 100.0 | 100.0 | 50.0 | 100.0 |" in signs
    )


def test_a_method_that_a_tower_does_not_serve_is_in_no_mean_and_has_empty_cells() -> None:
    everything = [
        taken("none", "none", {}, 4.0),
        taken("one", "none", {0: [0, 1, 2]}, 4.0),
        taken("two", "none", {}, 4.0),
        taken("none", "tome:32", {}, 2.5),
        taken("two", "tome:32", {0: [0, 1, 2]}, 2.5),
    ]
    text = towers.markdown({(one.method, one.tower): one for one in everything}, items(), [9, 4])
    assert "| none | 4.00 | 9 | 100.0 |" in text and "| tome:32 | 2.50 | 9 | 75.0 | -25.0 (" in text
    rates = text.partition("### Every method, all questions")[2].partition("###")[0]
    assert "| one | 75.0 | 100.0 |  |  |" in rates and "| two | 100.0 | 100.0 | 75.0 | 100.0 |" in rates


def test_a_run_leaves_out_what_a_tower_does_not_serve(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """hiprune reads scores that tome does not give: refused by the real export, before any question."""
    monkeypatch.setattr(
        towers, "take_exam", lambda folder, asked, keeps, threads: np.ones((len(keeps), len(asked)), bool)
    )
    flags = ["--count", "6", "--methods", "hiprune", "--keep", "32", "--towers", "none,tome:32"]
    assert towers.main([*flags, "--threads", "1", "--work", str(tmp_path / "work")]) == 0
    told = capsys.readouterr()
    assert "left out: " in told.err and "| hiprune | 100.0 |  |" in told.out


def test_the_first_tower_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert towers.main(["--towers", "ipcv:0.35,none"]) == 2
    assert "does not begin with none" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    page = tmp_path / "tower.md"
    page.write_text(f"before\n{towers.BEGIN}\nold\n{towers.END}\nafter\n")
    flags = ["--count", "6", "--methods", "uniform", "--keep", "32", "--towers", "none,downsample:224"]
    flags += ["--threads", "1", "--work", str(tmp_path / "work"), "--report", str(page)]
    assert towers.main(flags) == 0
    first = capsys.readouterr().out
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert "old" not in page.read_text() and "| downsample:224 | 1.13 | 32 |" in page.read_text()
    monkeypatch.setattr(towers, "export", lambda request: pytest.fail("exported again"))
    assert towers.main(flags) == 0
    assert capsys.readouterr().out == first
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]
