"""With --verify none every graph of a bundle is still opened once, or there is no bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import VtpError
from vtp.export.exporter import Request, export
from vtp.export.onnx.emit import WeightStore
from vtp.export.verify import opening
from vtp.runtime.bundle.folder import open_bundle


class OneWrong(WeightStore):
    """Writes a projector whose operator no engine has."""

    def externalize(self, model: Any, name: str) -> None:
        super().externalize(model, name)
        if name == "projector":
            next(iter(model.graph)).op_type = "NoSuchOperator"


def test_a_graph_that_does_not_open_leaves_no_bundle(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(model_folder("gqa"))
    asked = Request(tmp_path / "bundle", model, "uniform", "4", max_length=64, verify="none")
    with pytest.raises(VtpError, match=r"projector.onnx does not open on .*NoSuchOperator") as caught:
        export(asked, store=OneWrong)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_every_graph_is_opened(exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, opened, real = open_bundle(exported("vispruner").folder), list[str](), opening._open
    monkeypatch.setattr(opening, "_open", lambda one, file: (opened.append(file), real(one, file)))
    assert opening.open_each(bundle)
    assert opened == list(bundle.manifest.graphs) and len(opened) > 4
    monkeypatch.setattr(opening, "judge_engines", list)
    assert not opening.open_each(bundle) and len(opened) == len(bundle.manifest.graphs)
