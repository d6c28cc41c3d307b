"""Keep-counts and prune ratios, as they are asked for on the command line."""

from __future__ import annotations

import pytest

from vtp.engines import UsageError
from vtp.export.keep_counts import check_keep, keep_for_ratio, parse_keep


@pytest.mark.parametrize(
    ("ratio", "count", "keep"),
    [
        (0.0, 576, 576),
        (0.9, 576, 57),
        (0.5, 576, 288),
        (1.0, 576, 1),
        (0.999, 576, 1),
        (0.8, 10, 2),  # 10 * (1 - 0.8) is 1.9999999999999996
        (0.9, 10, 1),
        (0.1, 10, 9),
        (0.7, 10, 3),
        (0.6, 16, 6),
    ],
)
def test_prune_ratio_arithmetic(ratio: float, count: int, keep: int) -> None:
    assert keep_for_ratio(ratio, count) == keep


def test_exact_ratios_never_lose_a_token_to_rounding() -> None:
    for count in range(1, 700):
        for dropped in range(count):
            assert keep_for_ratio(dropped / count, count) == count - dropped


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("64", [64]),
        (" 64 , 32", [32, 64]),
        ("32:128:32", [32, 64, 96, 128]),
        ("32:100:32", [32, 64, 96]),
        ("8,8,4:8:2", [4, 6, 8]),
        ("+5", [5]),
    ],
)
def test_keep_counts(text: str, counts: list[int]) -> None:
    assert parse_keep(text) == counts


@pytest.mark.parametrize(
    "text", ["", " ", "a", "1.5", "1-3", "1:2", "1:2:3:4", ",", "١", "0x10", "1_0", "--5"]
)
def test_keep_counts_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_keep(text)


@pytest.mark.parametrize("counts", [[0], [-1], [577], [64, 577]])
def test_keep_counts_out_of_range(counts: list[int]) -> None:
    with pytest.raises(UsageError, match="choose 1 to 576"):
        check_keep(counts, 576)
