"""The exporter's checks judge by rows: planted massive channels, both ways, and nothing at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.onnx.emit import GraphInput, GraphSpec
from vtp.export.verify import parity
from vtp.export.verify.by_layers import Layers


class Same(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows


def spec(rows: np.ndarray, outputs: tuple[str, ...] = ("image_features",)) -> GraphSpec:
    return GraphSpec("vision_encoder", Same(), [GraphInput("rows", torch.from_numpy(rows))], list(outputs))


def massive() -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((1, 60, 256)).astype(np.float32)
    rows[..., 7] = 1000
    return rows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_graph_that_keeps_only_its_massive_channel_fails(dtype: str) -> None:
    rows = massive()
    lost = np.where(np.abs(rows) > 100, rows, 0)
    with pytest.raises(VtpError, match=r"check failed: image_features of vision_encoder is not .* row"):
        parity._compare(spec(rows), [rows], {"image_features": lost}, dtype)


def test_rounding_and_large_scales_pass_and_are_reported() -> None:
    rows = massive()
    found = parity._compare(spec(rows), [rows], {"image_features": rows.astype(np.float16)}, "float16")
    assert found["rows"] == 60 and 0 < found["relative"] < 1e-3 and found["cosine"] > 0.999999
    large = rows * np.float32(300)
    near = {"image_features": large * np.float32(1 + 1e-5)}
    assert parity._compare(spec(large), [large], near, "float32")["relative"] == pytest.approx(1e-5, rel=0.1)


def test_a_graph_without_rows_is_not_taken_for_a_good_one() -> None:
    rows = massive()[:, :0]
    with pytest.raises(VtpError, match="nothing to compare"):
        parity._compare(spec(rows), [rows], {"image_features": rows}, "float32")


def layers(**compared: int) -> Layers:
    made: Any = Layers.__new__(Layers)  # without a bundle
    made.compared = compared
    return made


def test_no_border_compared_is_a_failure() -> None:
    layers(vision_encoder=0, decoder=1).check_counts()
    for counts in ({}, {"vision_encoder": 0, "decoder": 0}):
        with pytest.raises(VtpError, match="no border between layers was compared"):
            layers(**counts).check_counts()


@pytest.mark.parametrize(("margin", "undecided"), [(0.0, True), (0.05, True), (1.0, False)])
def test_a_choice_is_open_where_float16_may_turn_it(margin: float, undecided: bool) -> None:
    logits = np.random.default_rng(1).standard_normal(500)
    first = logits.argmax()
    logits[first] = np.sort(logits)[-2] + margin
    assert parity._undecided(logits, "float16") == undecided
    assert parity._undecided(logits, "float32") == (margin == 0)
