"""One comparator for every check: massive channels hide nothing, large scales fail nothing."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from vtp.export.verify.compare import LIMITS, compare, limits_of

ROWS, WIDTH = 600, 512
DTYPES = ["float32", "float16"]


@functools.cache
def hidden(seed: int = 0, scale: float = 1.0, massive: int = 2, width: int = WIDTH) -> np.ndarray:
    """[1,600,width] as a decoder's hidden states are: some channels a thousand times the others."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((1, ROWS, width)) * scale
    values[..., random.choice(width, massive, replace=False)] *= 1000
    values = values.astype(np.float32)
    values.flags.writeable = False  # it is shared
    return values


def alone(value: float = 1000.0) -> tuple[np.ndarray, np.ndarray]:
    """One value of the whole tensor is massive; beside it in `got` everything is zero."""
    want = np.random.default_rng(1).standard_normal((1, ROWS, 4096)).astype(np.float32)
    want[0, 17, 5] = value
    got = np.zeros_like(want)
    got[0, 17, 5] = value
    return got, want


# -- what a massive value hid ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_massive_value_does_not_hide_that_all_others_are_gone(dtype: str) -> None:
    got, want = alone()
    assert np.abs(got - want).max() / np.abs(want).max() < 0.02  # as it was measured before
    assert not compare(got, want, dtype).ok
    only = compare(got[:, 17], want[:, 17], dtype)  # its own row, by itself
    assert not only.ok and only.relative > 0.9 and only.cosine < 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ordinary", [1.0, 0.1, 0.01])
def test_massive_channels_in_every_row_hide_nothing(dtype: str, ordinary: float) -> None:
    want = hidden(scale=ordinary).copy()
    want[..., np.abs(want[0]).max(axis=0) > 50 * ordinary] *= 1 / ordinary  # massive ones stay as large
    got = np.where(np.abs(want) > 50, want, 0).astype(np.float32)
    found = compare(got, want, dtype)
    assert not found.ok and found.rows == ROWS and found.relative > 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_massive_channel_itself_is_compared(dtype: str) -> None:
    want = hidden(massive=1)
    channel = int(np.abs(want[0]).max(axis=0).argmax())
    got = want.copy()
    got[0, :, channel] *= 1 + 1.5 * limits_of(dtype).element
    assert not compare(got, want, dtype).ok
    got[0, :, channel] = want[0, :, channel] * (1 + 0.1 * limits_of(dtype).relative)
    assert compare(got, want, dtype).ok


@pytest.mark.parametrize("width", [2, 3, 8, 64])
def test_narrow_rows_have_massive_channels_too(width: int) -> None:
    want = np.ones((4, width), np.float32)
    want[:, 0] = 1000
    got = np.zeros_like(want)
    got[:, 0] = 1000
    assert not compare(got, want, "float16").ok and compare(want, want, "float16").ok


# -- what a large scale failed ------------------------------------------------------------------------------


def test_a_large_scale_does_not_fail_float32() -> None:
    want = np.random.default_rng(2).standard_normal((1, ROWS, 4096)) * 300
    got = want * (1 + 1e-5 * np.random.default_rng(3).choice([-1, 1], want.shape))
    got, want = got.astype(np.float32), want.astype(np.float32)
    assert np.abs(got - want).max() > 1e-3  # as it was measured before
    found = compare(got, want, "float32")
    assert found.ok and 0.5e-5 < found.relative < 2e-5 and found.cosine > 0.999999


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0, 1e6])
def test_float32_s_verdict_does_not_depend_on_the_scale(scale: float) -> None:
    one, two = hidden(), hidden(seed=4)
    exact = compare(one * np.float32(1 + 1e-4), one, "float32").relative
    assert compare(one * np.float32(scale * (1 + 1e-4)), one * np.float32(scale), "float32").relative == (
        pytest.approx(exact, rel=0.05)
    )
    assert not compare(two * np.float32(scale), one * np.float32(scale), "float32").ok


@pytest.mark.parametrize("scale", [0.05, 1.0, 10.0])
def test_real_rounding_to_float16_passes(scale: float) -> None:
    want = hidden(scale=scale)
    found = compare(want.astype(np.float16), want, "float16")
    assert found.ok and found.relative < 5e-4


def test_a_real_layer_in_float16_passes_and_its_bugs_do_not() -> None:
    """torch's float16 kernels on rows with massive channels: a norm, a product, the sum with the rest."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(hidden().copy())
    weight = torch.randn(512, 512, generator=generator) / 512**0.5

    def layer(rows: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
        normed = torch.nn.functional.rms_norm(rows, (512,))
        return (rows + normed @ weight).float().numpy()

    want = layer(rows, weight)
    assert compare(layer(rows.half(), weight.half()), want, "float16").ok
    assert not compare(layer(rows.half(), weight.half().T.contiguous()), want, "float16").ok
    assert not compare(rows.numpy(), want, "float16").ok  # the layer left out


# -- bugs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("factor", [0.5, 0.93, 1.07, 2.0, -1.0])
def test_a_wrong_scale_fails(dtype: str, factor: float) -> None:
    assert not compare(hidden() * factor, hidden(), dtype).ok


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_swapped_rows_fail_and_the_worst_is_named(dtype: str) -> None:
    want = hidden()
    got = want.copy()
    got[0, [100, 250]] = want[0, [250, 100]]
    found = compare(got, want, dtype)
    assert not found.ok and found.worst_row in (100, 250) and f"row {found.worst_row}" in found.why


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("row", [0, 317, ROWS - 1])
def test_one_bad_row_among_six_hundred_fails(dtype: str, row: int) -> None:
    want = hidden()
    got = want.copy()
    got[0, row] += 0.3 * np.random.default_rng(5).standard_normal(WIDTH).astype(np.float32)
    found = compare(got, want, dtype)
    assert not found.ok and found.worst_row == row


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_one_bad_channel_fails(dtype: str) -> None:
    want = hidden(massive=0)
    got = want.copy()
    got[..., 9] = 0
    assert not compare(got, want, dtype).ok


def test_rows_are_counted_over_all_axes_but_the_last() -> None:
    want = np.random.default_rng(6).standard_normal((2, 3, 5, 8)).astype(np.float32)
    got = want.copy()
    got[1, 2, 3] *= -1
    found = compare(got, want, "float32")
    assert found.rows == 30 and found.worst_row == 1 * 15 + 2 * 5 + 3 and found.cosine == pytest.approx(-1)


def test_it_compares_more_than_fits_into_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(hidden(seed=7), hidden(), "float32")
    monkeypatch.setattr("vtp.runtime.compare._CHUNK", 10 * WIDTH)
    assert compare(hidden(seed=7), hidden(), "float32") == whole


# -- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_is_zeros(dtype: str) -> None:
    zeros = np.zeros((3, 16), np.float32)
    assert compare(zeros, zeros, dtype).ok
    for value in (1.0, 1e-3):
        other = zeros.copy()
        other[1, 4] = value
        assert compare(other, zeros, dtype).worst_row == 1
        assert not compare(other, zeros, dtype).ok and not compare(zeros, other, dtype).ok


def test_tiny_values_count_down_to_the_dtypes_digits() -> None:
    """float16's smallest normal number is 6.1e-5; what lies well below it has no digits to compare."""
    row = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    for scale in (1e-3, 1e-5):
        assert not compare(np.zeros_like(row), row * np.float32(scale), "float32").ok
        assert compare(row * np.float32(scale), row * np.float32(scale), "float32").ok
    tiny = row * np.float32(1e-8)
    assert compare(tiny.astype(np.float16), tiny, "float16").ok
    assert not compare(np.zeros_like(row), row * np.float32(1e-3), "float16").ok


@pytest.mark.parametrize("shape", [(5, 1), (1,), ()])
def test_rows_of_one_value(shape: tuple[int, ...]) -> None:
    want = np.full(shape, 3.0, np.float32)
    assert compare(want * np.float32(1 + 1e-6), want, "float32").ok
    assert not compare(want * np.float32(1.01), want, "float32").ok
    assert not compare(-want, want, "float32").ok and not compare(0 * want, want, "float32").ok


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_on_either_side(dtype: str, value: float) -> None:
    good = np.ones((4, 8), np.float32)
    bad = good.copy()
    bad[2, 3] = value
    for got, want in ((bad, good), (good, bad), (bad, bad)):
        found = compare(got, want, dtype)
        assert not found.ok and found.worst_row == 2 and found.relative == np.inf
        assert found.why == "row 2 has values that are not finite"


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,)])
def test_nothing_compared_is_no_success(shape: tuple[int, ...]) -> None:
    found = compare(np.zeros(shape, np.float32), np.zeros(shape, np.float32), "float32")
    assert not found.ok and found.rows == 0 and found.worst_row is None and "nothing" in found.why


def test_other_shapes_fail_and_are_told() -> None:
    assert compare(np.ones((2, 3)), np.ones((3, 2)), "float32").why == "shape [2, 3] instead of [3, 2]"


def test_whole_numbers_must_be_equal() -> None:
    want = np.arange(12).reshape(3, 4)
    assert compare(want, want, "float16").ok
    found = compare(want + (want == 9), want, "float16")
    assert not found.ok and found.worst_row == 2


def test_tensors_of_torch_and_dtypes_of_numpy_are_taken() -> None:
    rows = torch.ones(2, 4)
    assert compare(rows, rows, "float32").ok and compare(rows, rows, np.float16).ok  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no limits for 'float8'; choose one of float32, float16"):
        compare(rows, rows, "float8")


def test_sparse_rows_are_compared_where_they_are_not_zero() -> None:
    """After a ReLU most of a row is zero: rounding of the rest must not count as an error."""
    want = np.maximum(hidden(massive=0) - 1.5, 0)
    assert compare(want.astype(np.float16), want, "float16").ok
    assert not compare(want * np.float32(1.05), want, "float16").ok
