"""Measurements write where the user says or into the current checkout, never beside the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vtp.bench.common.checkout import checkout, place
from vtp.bench.compare import peers, peers_report
from vtp.bench.gpu import command as gpu
from vtp.bench.gpu import shape as gpu_shape
from vtp.bench.scaling import report as scaling_report
from vtp.bench.scaling import study as scaling
from vtp.engines import UsageError

ROOT = Path(__file__).parents[2]


def test_a_named_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert checkout("--out") == ROOT and place(None, "--work", "build/bench") == ROOT / "build/bench"
    assert place(str(tmp_path), "--work", "build/bench") == tmp_path


def test_another_project_is_not_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is not a checkout of vtp; run this in one, or give --out"):
        place(None, "--out")


@pytest.mark.parametrize(
    "command",
    [
        lambda: peers.main([]),
        lambda: peers_report.main(),
        lambda: scaling.main(["--quick"]),
        lambda: scaling_report.main(),
        lambda: gpu.main(["--engine", "ort-cpu"]),
        lambda: gpu_shape.main(["--engine", "ort-cpu"]),
    ],
    ids=["peers", "peers_report", "scaling", "scaling_report", "gpu", "gpu_shape"],
)
def test_elsewhere_one_line_says_what_to_do(
    command: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command() == 2
    said = capsys.readouterr().err
    assert "is not a checkout of vtp; run this in one, or give" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
