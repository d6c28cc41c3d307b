"""The scaling study on a tiny bundle: which points, resuming, the page and what is kept in it. No time is
asserted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtp.bench.scaling import report as scaling_report
from vtp.bench.scaling import study as scaling
from vtp.bench.scaling.run import Bench, Point
from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.memory import PROCESS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def studied(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quick study of a tiny bundle: the folder written to, and where its journal was."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'vtp-edge[bench]'")
    out = tmp_path_factory.mktemp("scaling")
    folder = exported("vispruner").folder
    arguments = [str(folder), "--quick", "--tokens", "3", "--threads", "2", "--work", str(out)]
    assert scaling.main(arguments) == 0
    return out, out / f"scaling-{folder.name}.jsonl"


def test_every_axis_is_measured_and_drawn(studied: tuple[Path, Path]) -> None:
    out, journal = studied
    results = json.loads((out / "docs/scaling.json").read_text())
    xs = {axis: [row["x"] for row in scaling_report.rows(results, axis)] for axis in scaling_report.TITLES}
    assert xs["visual tokens"] == xs["visual tokens, all kept"] == [16, 32]
    assert xs["tokens kept"] == [3, 6] and xs["batch"] == xs["streams"] == [1, 2]
    assert 32 <= xs["text tokens"][0] < 64 <= xs["text tokens"][1]
    first = scaling_report.rows(results, "visual tokens")
    assert first[1]["flops"] > first[0]["flops"] > 0 and all(row["ttft"]["runs"] == 1 for row in first)
    assert (out / "docs/scaling.png").read_bytes().startswith(b"\x89PNG")
    assert not journal.exists()


def test_the_page_keeps_what_was_written_by_hand(studied: tuple[Path, Path]) -> None:
    out, _ = studied
    results = json.loads((out / "docs/scaling.json").read_text())
    page = (out / "docs/scaling.md").read_text()
    assert scaling_report.UNREAD in page and page == scaling_report.page(results, scaling_report.UNREAD)
    (out / "docs/scaling.md").write_text(page.replace(scaling_report.UNREAD, "Attention grows with S²."))
    scaling_report.write_report(results, out)
    assert "Attention grows with S²." in (out / "docs/scaling.md").read_text()


def test_a_run_that_was_ended_goes_on(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the journal holds is not measured again; other settings begin anew."""
    bundle, asked = open_bundle(exported("vispruner").folder), []

    def answer(_: Any, point: Point) -> dict[str, Any]:
        asked.append(point)
        if len(asked) == 4:
            raise VtpError("ended")
        return {"ttft": 1.0}

    class Opened:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> list[Any]:
            return []

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(scaling, "together", answer)
    monkeypatch.setattr(scaling, "streams", Opened)
    with pytest.raises(VtpError, match="ended"):
        scaling.Study(bundle, 2, 3, 1, False).measure(tmp_path / "j", lambda _: None)
    with (tmp_path / "j").open("a") as journal:
        journal.write('{"point": {"pic')  # ended while it was written
    whole = scaling.Study(bundle, 2, 3, 1, False)
    whole.measure(tmp_path / "j", lambda _: None)
    points = {point for line in whole.axes.values() for point in line}
    assert len(whole.runs) == 2 * len(points) == len(asked) - 1
    other = scaling.Study(bundle, 1, 3, 1, False)
    other.measure(tmp_path / "j", lambda _: None)
    assert len(other.runs) == len(points)


def test_several_pictures_and_prompts_cost_their_operations(exported: Any, picture_file: Path) -> None:
    bench = Bench(str(exported("vispruner").folder), str(picture_file), 1, 2)
    one, two = bench.ask(Point(keep=6)), bench.ask(Point(keep=6, pictures=2))
    four = bench.ask(Point(keep=6, batch=4))
    bench.close()
    assert (one["before"], one["after"], two["before"], two["after"]) == (16, 6, 32, 12)
    assert two["flops"]["encoder"] == 2 * one["flops"]["encoder"]
    assert four["flops"]["encoder"] == 4 * one["flops"]["encoder"]
    assert sum(one["parts"].values()) == pytest.approx(one["ttft"])


def test_a_slope_is_of_logarithms() -> None:
    assert scaling_report.slope([2, 4], [10, 20]) == pytest.approx(1)
    assert scaling_report.slope([2, 4], [10, 40]) == pytest.approx(2)
    assert scaling_report.slope([1, 8], [5, 5]) == 0


def test_what_the_bundle_has_no_room_for_is_named(exported: Any) -> None:
    bundle = open_bundle(exported("vispruner").folder)
    found, dropped = scaling.axes(bundle, 9, False)
    assert [point.pictures for point in found["visual tokens"]] == [1, 2, 3, 4]
    assert "more than 64 visual tokens: longer than the bundle" in dropped
    assert "128 text tokens: longer than the bundle" in dropped
    with pytest.raises(UsageError, match="holds 128 positions, which 16 visual and 32 text tokens fill"):
        scaling.axes(bundle, 100, False)


def test_streams_that_do_not_fit_in_memory_are_left_out(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = SimpleNamespace(memory=SimpleNamespace(usable=3 * PROCESS))
    monkeypatch.setattr(scaling, "look", lambda: room)
    study = scaling.Study(open_bundle(exported("vispruner").folder), 1, 3, 1, False)
    assert [point.streams for point in study.axes["streams"]] == [2]
    assert "4 streams take about" in study.dropped[-1]


def test_a_method_of_one_picture_a_prompt_leaves_the_other_axes(exported: Any) -> None:
    found, dropped = scaling.axes(open_bundle(exported("adaptprune").folder), 9, False)
    assert len(found["visual tokens"]) == 1 and len(found["batch"]) == 4
    assert "more than 16 visual tokens: the bundle takes one picture a prompt" in dropped


def test_bad_flags_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([str(tmp_path), "--rounds", "no", "--work", str(tmp_path)]) == 2
    assert scaling.main([str(tmp_path), "--work", str(tmp_path)]) == 1
    assert scaling.main(["--shape", "smolvlm-256m", "--work", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "rounds 'no' is not a whole number" in said[0] and "is not a bundle" in said[1] and len(said) == 3
    assert "shape smolvlm-256m has no 576 visual tokens a picture" in said[2]


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    figures, page = ROOT / "docs/scaling.json", ROOT / "docs/scaling.md"
    if not figures.exists():
        pytest.skip("docs/scaling.json is not there: make scaling")
    text, results = page.read_text(encoding="utf-8"), json.loads(figures.read_text(encoding="utf-8"))
    why = scaling_report.reasons(text)
    assert text == scaling_report.page(results, why) and why != scaling_report.UNREAD
