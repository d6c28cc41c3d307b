"""Positions, rotary embeddings and windows of the Qwen-VL models against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vtp.export.families.qwen_vl.positions import GridSplice
from vtp.export.families.qwen_vl.tower import PatchGrid
from vtp.export.graphs.rotary import AxesRotary

from ...models.tiny_qwen import IMAGE, MERGE, PATCH, tiny_qwen

# Least number of text tokens before, between and after pictures: marks stand between any two.
BETWEEN = [(0, 1), (0, 1, 1), (0, 2, 1, 1)]


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_qwen("qwen2_vl")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_positions_are_transformers(plain: Any, data: st.DataObject) -> None:
    """Kept tokens have the positions that they have among all; the text around them has its own."""
    grid = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    texts = [data.draw(st.integers(least, 4)) for least in data.draw(st.sampled_from(BETWEEN))]
    count, images = grid[0] * grid[1], len(texts) - 1
    among = st.permutations(range(count))
    size = data.draw(st.integers(1, count))
    keep = [sorted(data.draw(among)[:size]) for _ in range(images)]
    ids, stay, starts = [9] * texts[0], list(range(texts[0])), list[int]()
    for number, after in enumerate(texts[1:]):
        starts.append(len(ids) - number * (count - 1))
        stay += [*(len(ids) + token for token in keep[number])]
        ids += [IMAGE] * count
        stay += range(len(ids), len(ids) + after)
        ids += [9] * after
    kinds = torch.tensor([ids]) == IMAGE
    thw = torch.tensor([[1, MERGE * grid[0], MERGE * grid[1]]] * images)
    wanted, deltas = plain.model.get_rope_index(torch.tensor([ids]), kinds.int(), image_grid_thw=thw)
    text, rows = torch.rand(2, sum(texts) + images, 3), torch.rand(2 * images, size, 3)
    start, kept, splice = torch.tensor([starts] * 2), torch.tensor(keep * 2), GridSplice(1, grid)
    prompt, positions, following = splice(text, rows, start, kept)
    assert torch.equal(positions[1], wanted[:, 0, stay].T)
    assert following.tolist() == [int(deltas) + len(ids)] * 2
    pieces = text[1].tensor_split([edge for place in starts for edge in (place, place + 1)])
    parts = [part for pair in zip(pieces[0::2], [*rows[images:], text[:0, 0]], strict=True) for part in pair]
    assert torch.equal(prompt[1], torch.cat(parts))
    if size == count:
        assert torch.equal(splice(text, rows, start)[1], positions)


@pytest.mark.parametrize(
    ("config_class", "section"), [(Qwen2VLTextConfig, [16, 24, 24]), (Qwen3VLTextConfig, [24, 20, 20])]
)
def test_turns_are_transformers(config_class: Any, section: list[int]) -> None:
    """Heads as wide as in released models, one section after another or in turns."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    config = config_class(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    kind = Qwen2VLRotaryEmbedding if config_class is Qwen2VLTextConfig else Qwen3VLTextRotaryEmbedding
    rotary, hidden = kind(config), torch.zeros(2, 7, 256)
    positions = torch.randint(0, 500, (2, 7, 3), generator=torch.Generator().manual_seed(0))
    turned, wanted = AxesRotary(rotary, 3)(hidden, positions), rotary(hidden, positions.permute(2, 0, 1))
    assert turned[0].shape == (2, 7, 128)
    torch.testing.assert_close(turned, wanted)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_windows_and_places_are_transformers(high: int, wide: int, side: int) -> None:
    grid = PatchGrid(MERGE * high, MERGE * wide, MERGE)
    thw = torch.tensor([[1, grid.rows, grid.columns]])
    order, ends = get_vision_window_index(thw, MERGE, side * MERGE * PATCH, PATCH)
    windows = grid.windows(side)
    assert [token for window in windows for token in window] == order.tolist()
    assert [MERGE**2 * len(window) for window in windows] == ends.diff().tolist()
    assert torch.equal(grid.places(), get_vision_position_ids(thw, MERGE))
