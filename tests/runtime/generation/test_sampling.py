"""The eligible tokens are those of transformers' warpers, and picks are fair, repeatable and honest."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.generation.sampling import Sampler


def oracle(logits: np.ndarray, temperature: float, top_p: float, top_k: int | None) -> np.ndarray:
    """Probabilities [V] after transformers' warpers, in the order in which `generate` applies them."""
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits.astype(np.float32))[None])
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)[0].numpy()


def spread(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    kept, probabilities = sampler.distribution(logits)
    assert len(set(kept.tolist())) == len(kept)
    result = np.zeros(logits.size)
    result[kept] = probabilities
    return result


@pytest.mark.parametrize("top_k", [None, 1, 7, 10_000])
@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
def test_kept_tokens_equal_transformers(temperature: float, top_p: float, top_k: int | None) -> None:
    chance = np.random.default_rng(3)
    sizes = set()
    for vocabulary in (5, 257, 4000):
        for scale in (0.1, 2.0, 9.0):
            logits = (chance.standard_normal(vocabulary) * scale).astype(np.float32)
            ours = spread(Sampler(temperature, top_p, top_k), logits)
            expected = oracle(logits, temperature, top_p, top_k)
            np.testing.assert_array_equal(ours > 0, expected > 0)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
            sizes.add(int((ours > 0).sum()))
    assert len(sizes) > 1 or top_k == 1 or top_p < 0.3


@settings(max_examples=150, deadline=None)
@given(
    logits=hnp.arrays(np.float16, st.integers(1, 40), elements=st.integers(-24, 24).map(lambda n: n / 4)),
    top_p=st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]),
    top_k=st.none() | st.integers(1, 12),
)
def test_equal_logits_are_treated_as_in_transformers(
    logits: np.ndarray, top_p: float, top_k: int | None
) -> None:
    """float16 with many ties, where torch leaves open which of equal tokens stay, but not how many."""
    ours, expected = spread(Sampler(0.5, top_p, top_k), logits), oracle(logits, 0.5, top_p, top_k)
    np.testing.assert_array_equal(np.sort(logits[ours > 0]), np.sort(logits[expected > 0]))
    for value in np.unique(logits[ours > 0]):
        stays = (ours > 0)[logits == value]
        assert not (np.diff(stays.astype(int)) > 0).any()  # of equal ones, the lower ids


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    for dtype in (np.float32, np.float16):
        assert Sampler().pick(np.array([0, 3, 1, 3], dtype)) == 1
        assert Sampler(temperature=0.0, seed=4).pick(np.array([-9], dtype)) == 0


def test_a_seed_repeats_and_seeds_differ() -> None:
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)

    def picks(seed: int | None) -> list[int]:
        sampler = Sampler(temperature=1.0, seed=seed)
        return [sampler.pick(logits) for _ in range(40)]

    assert picks(7) == picks(7)
    assert len({tuple(picks(seed)) for seed in (1, 2, None, None)}) == 4


def test_picks_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.05, 0.3, 0.15], np.float32))
    sampler = Sampler(temperature=1.0, top_p=0.9, seed=11)
    counts = np.bincount([sampler.pick(logits) for _ in range(20_000)], minlength=4) / 20_000
    expected = oracle(logits, 1.0, 0.9, None)
    assert expected[1] == 0 and counts[1] == 0
    assert np.abs(counts - expected).max() < 0.015


def test_a_tiny_temperature_is_greedy_and_never_breaks() -> None:
    logits = np.array([1, 50, 49.9, -60_000], np.float32)
    for temperature in (1e-3, 1e-30, 1e-320):
        sampler = Sampler(temperature=temperature, top_p=0.9, seed=0)
        assert {sampler.pick(logits) for _ in range(50)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = np.zeros(9, np.float16)
    logits[4] = bad
    with pytest.raises(VtpError, match="1 of 9 logits"):
        Sampler(temperature).pick(logits)


@pytest.mark.parametrize("shape", [(0,), (1, 4), ()])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(VtpError, match="one row of logits"):
        Sampler().pick(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "warm"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": -1},
        {"top_p": None},
        {"top_k": 0},
        {"top_k": 2.5},
        {"seed": -1},
        {"seed": 0.5},
        {"seed": "x"},
    ],
    ids=str,
)
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Sampler(**options)
    name = next(iter(options))
    assert (
        str(caught.value).startswith(name) and "choose" in str(caught.value) and "\n" not in str(caught.value)
    )
