"""Visual tokens among marks: splice, text cues and decoder pruning against lists of names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtp.export.graphs.runs import Runs, RunsDecoderPruner, RunsSplice, RunsTextCues
from vtp.export.pruners.base import Pruner


@dataclass(frozen=True)
class Prompt:
    """Two prompts of one length as lists: ("text", place in input_ids) or ("token", number)."""

    runs: Runs
    starts: tuple[int, int]
    text: int  # text tokens around the picture

    def ids(self) -> int:
        return self.text + len(self.runs.lengths) + self.runs.marked

    def placeholders(self) -> int:
        return len(self.runs.lengths) + self.runs.marked

    def full(self, row: int) -> list[tuple[str, int]]:
        """All N tokens, marks and text."""
        items, place, number = [("text", place) for place in range(self.starts[row])], self.starts[row], 0
        for run, length in enumerate(self.runs.lengths):
            items += [("token", number + item) for item in range(length)]
            number, place = number + length, place + 1
            for _ in range(self.runs.marks[run] if run < len(self.runs.marks) else 0):
                items.append(("text", place))
                place += 1
        return items + [("text", item) for item in range(place, self.ids())]

    def left(self, row: int, tokens: list[int]) -> list[tuple[str, int]]:
        return [item for item in self.full(row) if item[0] == "text" or item[1] in tokens]


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    lengths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    marks = [draw(st.integers(1, 3)) for _ in lengths[1:]]
    text = draw(st.integers(2, 6))
    starts = draw(st.integers(0, text - 1)), draw(st.integers(0, text - 1))
    return Prompt(Runs(tuple(lengths), tuple(marks)), starts, text)


def some(draw: st.DrawFn, among: int, size: int) -> list[list[int]]:
    """Two rows of `size` numbers below `among`, ascending."""
    return [sorted(draw(st.permutations(range(among)))[:size]) for _ in range(2)]


def names(prompt: Prompt, items: list[tuple[str, int]]) -> list[int]:
    """Text by its place, tokens by their number from 1000 on."""
    return [number + 1000 if kind == "token" else number for kind, number in items]


class Fixed(Pruner):
    name = "fixed"
    site = "decoder:1"
    needs = ("hidden_states",)

    def __init__(self, count: int, keep: Tensor) -> None:
        super().__init__((1, count), keep.shape[1])
        self.answer, self.seen = keep, torch.empty(0)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        self.seen = hidden_states[..., 0]
        return self.answer


@settings(max_examples=150, deadline=None)
@given(st.data(), prompts())
def test_the_splice_keeps_every_mark_in_its_place(data: st.DataObject, prompt: Prompt) -> None:
    count = prompt.runs.count
    keep = some(data.draw, count, data.draw(st.integers(1, count)))
    text = torch.arange(prompt.ids()).float().repeat(2, 1).unsqueeze(2)
    image, start = 1000.0 + torch.tensor(keep).unsqueeze(2), torch.tensor(prompt.starts).unsqueeze(1)
    for positions in ("compact", "original"):
        splice = RunsSplice(prompt.placeholders(), prompt.runs, positions)
        embeds, numbers, following = splice(text, image, start, torch.tensor(keep))
        for row in range(2):
            left = prompt.left(row, keep[row])
            assert embeds[row, :, 0].tolist() == names(prompt, left)
            places = [prompt.full(row).index(item) for item in left]
            assert numbers[row].tolist() == (places if splice.original else list(range(len(left))))
            assert following[row] == (len(prompt.full(row)) if splice.original else len(left))
    whole = RunsSplice(prompt.placeholders(), prompt.runs)
    embeds, _, _ = whole(text, 1000.0 + torch.arange(count).repeat(2, 1).unsqueeze(2), start)
    assert [embeds[row, :, 0].tolist() for row in range(2)] == [
        names(prompt, prompt.full(row)) for row in range(2)
    ]


@settings(max_examples=100, deadline=None)
@given(prompts())
def test_marks_are_text_for_methods_that_read_it(prompt: Prompt) -> None:
    text = torch.arange(prompt.ids()).float().repeat(2, 1).unsqueeze(2)
    cues = RunsTextCues(prompt.placeholders(), prompt.runs)
    embeds, mask, rows = cues(text, torch.tensor(prompt.starts).unsqueeze(1), torch.full((2,), prompt.ids()))
    for row in range(2):
        full = prompt.full(row)
        words = [place for place, item in enumerate(full) if item[0] == "text"]
        assert rows[row].tolist() == words
        assert embeds[row, :, 0].tolist() == [full[place][1] for place in words]
        assert mask[row].tolist() == [float(place > full.index(("token", 0))) for place in words]


@settings(max_examples=150, deadline=None)
@given(st.data(), prompts())
def test_two_cuts_in_the_decoder(data: st.DataObject, prompt: Prompt) -> None:
    """What the first leaves is what arrives at the second: hidden states, positions, rows of the text."""
    count, start = prompt.runs.count, torch.tensor(prompt.starts).unsqueeze(1)
    once = data.draw(st.integers(1, count))
    first = some(data.draw, count, once)
    second = some(data.draw, once, data.draw(st.integers(1, once)))
    fulls = [prompt.full(row) for row in range(2)]
    hidden = torch.tensor([names(prompt, full) for full in fulls]).float().unsqueeze(2)
    numbers = torch.arange(hidden.shape[1]).repeat(2, 1)
    cues = RunsTextCues(prompt.placeholders(), prompt.runs)
    rows = cues(torch.zeros(2, prompt.ids(), 1), start, torch.full((2,), prompt.ids()))[2]
    previous, tokens = None, [list(range(count)) for _ in range(2)]
    for keep in (first, second):
        arriving = tokens
        pruner = Fixed(len(arriving[0]), torch.tensor(keep))
        others = ["text_rows"] if previous is None else ["previous_indices", "text_rows"]
        given_ = [rows] if previous is None else [previous, rows]
        part = RunsDecoderPruner(pruner, others, prompt.runs)
        previous, hidden, numbers, rows = part(hidden, numbers, start, *given_)
        tokens = [[arriving[row][place] for place in keep[row]] for row in range(2)]
        assert previous.tolist() == tokens
        for row in range(2):
            left = prompt.left(row, tokens[row])
            assert pruner.seen[row].tolist() == [1000.0 + number for number in arriving[row]]
            assert hidden[row, :, 0].tolist() == names(prompt, left)
            assert numbers[row].tolist() == [fulls[row].index(item) for item in left]
            assert rows[row].tolist() == [place for place, item in enumerate(left) if item[0] == "text"]
