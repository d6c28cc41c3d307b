"""An output that cannot be written to is refused before the model is loaded."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import UsageError
from vtp.export.checkpoint import loading
from vtp.export.cli import main as export_main
from vtp.runtime.bundle.folder import check_output
from vtp.runtime.commands import build

# Root may write anywhere, but not there.
REFUSED = [folder for folder in ("/sys", "/proc") if Path(folder).is_dir()]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load", fail)


@pytest.mark.parametrize("above", REFUSED)
def test_vtp_export_says_so_at_once(above: str, unloaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    for output in (f"{above}/bundle", f"{above}/a/b/bundle"):
        assert export_main(["--method", "uniform", "-o", output]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"vtp-export: error: output {output} cannot be used: ")
        assert error.count("\n") == 1


def test_a_read_only_disk_is_said(unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UsageError, match="cannot be used: Read-only file system"):
        check_output(tmp_path / "bundle", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_trying_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "bundle", overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not REFUSED, reason="neither /sys nor /proc here")
def test_vtp_build_says_so_before_it_builds(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("an engine was built")

    monkeypatch.setattr(build, "build_bundle", fail)
    folder = str(exported("vispruner").folder)
    assert build.main([folder, "--engine", "tensorrt", "-o", f"{REFUSED[0]}/engines"]) == 2
    assert f"output {REFUSED[0]}/engines cannot be used: " in capsys.readouterr().err
