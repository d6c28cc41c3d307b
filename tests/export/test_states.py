"""States as graphs hold them: against loops, with padding, in pieces, and on a cache with anything in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtp.export.graphs.attention.operators import Cache, Lengths
from vtp.export.graphs.attention.states import causal_convolution


def convolved(row: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A causal convolution of one row [D,S], channel by channel and token by token."""
    out = np.zeros_like(row)
    for channel, token in np.ndindex(*row.shape):
        for back in range(min(token + 1, weight.shape[1])):
            out[channel, token] += weight[channel, -1 - back] * row[channel, token - back]
    return out + bias[:, None]


class Rows:
    """Right-padded rows [B,D,S] read in several runs, as a graph reads them; state of layer 3."""

    def __init__(self, batch: int, width: int, length: int) -> None:
        self.state = torch.full((batch, width, length), float("nan"))  # what an earlier prompt left
        self.lengths = np.zeros(batch, np.int32)

    def read(self, rows: np.ndarray, counts: list[int], weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        self.lengths += np.array(counts, np.int32)
        total = torch.tensor(int(self.lengths.max()), dtype=torch.int32)
        cache = Cache({}, Lengths(torch.tensor(self.lengths - 1), total), states={("conv", 3): self.state})
        assert cache.get_conv_state(3) is None
        joined = cache.update_conv_state(torch.from_numpy(rows), 3, conv_kernel_size=weight.shape[1])
        self.state = cache.carried["conv", 3]
        return causal_convolution(joined, torch.from_numpy(weight), torch.from_numpy(bias)).numpy()


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_a_convolution_goes_on_where_each_row_ended(kernel: int) -> None:
    """Prompts of 5, 1 and 7 tokens, padded with what would spoil everything; then three steps of all rows."""
    rng, counts = np.random.default_rng(kernel), [5, 1, 7]
    rows = rng.standard_normal((3, 2, 10)).astype(np.float32)
    weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, kernel), (2,)))
    padded = np.stack(
        [
            np.pad(row[:, :count], [(0, 0), (0, 7 - count)], constant_values=1e6)
            for row, count in zip(rows, counts, strict=True)
        ]
    )
    reader = Rows(3, 2, kernel)
    found = [reader.read(padded, counts, weight, bias)]
    for step in range(3):
        taken = np.stack(
            [row[:, count + step : count + step + 1] for row, count in zip(rows, counts, strict=True)]
        )
        found.append(reader.read(taken, [1, 1, 1], weight, bias))
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        wanted = convolved(row[:, : count + 3], weight, bias)
        ours = np.concatenate([found[0][number][:, :count], *(one[number] for one in found[1:])], axis=1)
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
        last = np.pad(row[:, : count + 3], [(0, 0), (kernel, 0)])[:, -kernel:]
        np.testing.assert_array_equal(reader.state[number].numpy(), last)


def test_a_prompt_in_pieces_and_a_slot_that_is_taken_again() -> None:
    """One row: 4 tokens, 3 more, then another prompt of 2 upon a cache whose length was set to 0."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, 2, 7)).astype(np.float32)
    weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3), (2,)))
    reader = Rows(1, 2, 3)
    parts = [reader.read(rows[:, :, :4], [4], weight, bias), reader.read(rows[:, :, 4:], [3], weight, bias)]
    np.testing.assert_allclose(np.concatenate(parts, axis=2)[0], convolved(rows[0], weight, bias), atol=1e-5)
    reader.lengths[:] = 0
    again = reader.read(rows[:, :, 2:4], [2], weight, bias)
    np.testing.assert_allclose(again[0], convolved(rows[0, :, 2:4], weight, bias), atol=1e-5)


def test_an_activation_follows() -> None:
    rows = torch.tensor([[[0.0, 0.0, 1.0, -2.0]]])
    found = causal_convolution(rows, torch.tensor([[0.0, 3.0]]), activation="silu")
    np.testing.assert_allclose(found.numpy(), [[[3 / (1 + np.exp(-3.0)), -6 / (1 + np.exp(6.0))]]], rtol=1e-6)
