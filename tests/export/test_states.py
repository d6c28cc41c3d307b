"""States as graphs hold them: against loops, with padding, in pieces, and on a cache with anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vtp.engines.ort.session import OrtEngine
from vtp.export.graphs.attention.operators import Cache, Lengths
from vtp.export.graphs.attention.states import causal_convolution
from vtp.export.onnx.emit import GraphInput, GraphSpec, WeightStore, emit


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


class Delta(nn.Module):
    """Linear attention on a cache, as a decoder's graph has it."""

    def forward(
        self, query: Any, key: Any, value: Any, decay: Any, beta: Any, state: Any, *lengths: Any
    ) -> Any:
        cache = Cache({}, Lengths(*lengths), states={("recurrent", 0): state})
        before = cache.get_recurrent_state(0)
        output, after = cache.linear_attention(query, key, value, g=decay, beta=beta, initial_state=before)
        cache.update_recurrent_state(after, 0)
        return output, cache.carried["recurrent", 0]


def test_linear_attention_is_transformers(tmp_path: Path) -> None:
    """Long prompts whose keys hardly differ and hardly decay, padded; then a step; a slot that held NaN."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule as rule

    groups, heads, depth, width, counts = 2, 4, 8, 12, [150, 37]
    shapes = {"query": (groups, depth), "key": (groups, depth), "value": (heads, width), "decay": (heads,)}
    rng, rows = np.random.default_rng(0), {1: "sequence", 0: "batch"}
    names = [*shapes, "beta"]
    shapes["beta"] = (heads,)
    given = {name: rng.standard_normal((2, 151, *shapes[name])).astype(np.float32) for name in names}
    given["key"] = 1 + 0.01 * given["key"]
    given["decay"], given["beta"] = -0.01 * np.abs(given["decay"]), 1 / (1 + np.exp(-given["beta"]))
    inputs = [GraphInput(name, torch.from_numpy(given[name][:, :5]), rows) for name in names]
    inputs.append(GraphInput("past", torch.zeros(2, heads, depth, width), {0: "batch"}))
    inputs.append(GraphInput("seqlens_k", torch.tensor([4, 4], dtype=torch.int32), {0: "batch"}))
    inputs.append(GraphInput("total", torch.tensor(5, dtype=torch.int32)))
    engine = OrtEngine(
        emit(GraphSpec("delta", Delta(), inputs, ["output", "present"]), WeightStore(tmp_path))
    )

    def run(feeds: dict[str, np.ndarray], past: np.ndarray, held: list[int]) -> dict[str, np.ndarray]:
        ends = np.array(held, np.int32)
        more = {"past": past, "seqlens_k": ends - 1, "total": ends.max().astype(np.int32)}
        fed = {name: engine.put(np.asarray(array)) for name, array in {**feeds, **more}.items()}
        return {name: value.numpy() for name, value in engine.run(fed).items()}

    prompt = {name: array[:, :150].copy() for name, array in given.items()}
    for array in prompt.values():
        array[1, 37:] = 1e3  # padding
    first = run(prompt, np.full((2, heads, depth, width), np.nan, np.float32), counts)
    step = {
        name: np.stack([array[row, count : count + 1] for row, count in enumerate(counts)])
        for name, array in given.items()
    }
    second = run(step, first["present"], [count + 1 for count in counts])
    for row, count in enumerate(counts):
        own = {name: torch.from_numpy(array[row : row + 1, : count + 1]) for name, array in given.items()}
        wanted, state = rule(
            own["query"],
            own["key"],
            own["value"],
            own["decay"],
            own["beta"],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        found = np.concatenate([first["output"][row, :count], second["output"][row]])
        np.testing.assert_allclose(found, wanted[0].numpy(), atol=2e-5 * np.abs(wanted.numpy()).max())
        np.testing.assert_allclose(
            second["present"][row], state[0].numpy(), atol=2e-5 * float(state.abs().max())
        )
