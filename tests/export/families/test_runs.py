"""Visual tokens among marks: splice, text cues and decoder pruning against lists of names."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtp.export.families.tiled.runs import Runs, RunsDecoderPruner, RunsSplice, RunsTextCues
from vtp.export.pruners.base import Pruner


@dataclass(frozen=True)
class Prompt:
    """Two prompts of one length as lists: ("text", place in input_ids) or ("token", number).

    The number of token t of picture i is 100 i + t.
    """

    runs: Runs
    texts: tuple[list[int], list[int]]  # text tokens before the first picture and after each

    @property
    def images(self) -> int:
        return len(self.texts[0]) - 1

    def ids(self) -> int:
        return sum(self.texts[0]) + self.images * self.placeholders()

    def placeholders(self) -> int:
        return len(self.runs.lengths) + self.runs.marked

    def starts(self) -> Tensor:
        """image_start [2,I]."""
        whole = self.placeholders()
        return torch.tensor(
            [[sum(text[: i + 1]) + i * whole for i in range(self.images)] for text in self.texts]
        )

    def full(self, row: int) -> list[tuple[str, int]]:
        """All N tokens of every picture, marks and text."""
        items: list[tuple[str, int]] = []
        place = 0

        def say(count: int) -> None:
            nonlocal place
            items.extend(("text", place + item) for item in range(count))
            place += count

        say(self.texts[row][0])
        for image, after in enumerate(self.texts[row][1:]):
            number = 100 * image
            for length, marks in zip(self.runs.lengths, [*self.runs.marks, 0], strict=True):
                items += [("token", number + item) for item in range(length)]
                number, place = number + length, place + 1
                say(marks)
            say(after)
        return items

    def left(self, row: int, tokens: list[int]) -> list[tuple[str, int]]:
        return [item for item in self.full(row) if item[0] == "text" or item[1] in tokens]


@st.composite
def prompts(draw: st.DrawFn, most: int = 3) -> Prompt:
    """With 1 to `most` pictures."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    marks = [draw(st.integers(1, 3)) for _ in lengths[1:]]
    images, text = draw(st.integers(1, most)), draw(st.integers(2, 6))
    edges = st.lists(st.integers(0, text - 1), min_size=images, max_size=images).map(sorted)
    cuts = [[0, *draw(edges), text] for _ in range(2)]
    texts = [[high - low for low, high in pairwise(cut)] for cut in cuts]
    return Prompt(Runs(tuple(lengths), tuple(marks)), (texts[0], texts[1]))


def some(draw: st.DrawFn, among: int, size: int, rows: int = 2) -> list[list[int]]:
    """Rows of `size` numbers below `among`, ascending."""
    return [sorted(draw(st.permutations(range(among)))[:size]) for _ in range(rows)]


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
    count, images = prompt.runs.count, prompt.images
    keep = some(data.draw, count, data.draw(st.integers(1, count)), 2 * images)
    named = [[100 * (row % images) + token for token in own] for row, own in enumerate(keep)]
    text = torch.arange(prompt.ids()).float().repeat(2, 1).unsqueeze(2)
    image = 1000.0 + torch.tensor(named).unsqueeze(2)
    for positions in ("compact", "original"):
        splice = RunsSplice(prompt.placeholders(), prompt.runs, positions)
        embeds, numbers, following = splice(text, image, prompt.starts(), torch.tensor(keep))
        for row in range(2):
            own = named[row * images : (row + 1) * images]
            left = prompt.left(row, [token for tokens in own for token in tokens])
            assert embeds[row, :, 0].tolist() == names(prompt, left)
            places = [prompt.full(row).index(item) for item in left]
            assert numbers[row].tolist() == (places if splice.original else list(range(len(left))))
            assert following[row] == (len(prompt.full(row)) if splice.original else len(left))
    whole = RunsSplice(prompt.placeholders(), prompt.runs)
    every = 100.0 * torch.arange(images).repeat(2).unsqueeze(1) + torch.arange(count)
    embeds, _, _ = whole(text, 1000.0 + every.unsqueeze(2), prompt.starts())
    assert [embeds[row, :, 0].tolist() for row in range(2)] == [
        names(prompt, prompt.full(row)) for row in range(2)
    ]


@settings(max_examples=100, deadline=None)
@given(prompts())
def test_marks_are_text_for_methods_that_read_it(prompt: Prompt) -> None:
    text = torch.arange(prompt.ids()).float().repeat(2, 1).unsqueeze(2)
    cues = RunsTextCues(prompt.placeholders(), prompt.runs)
    embeds, mask, rows = cues(text, prompt.starts(), torch.full((2,), prompt.ids()))
    for row in range(2):
        full = prompt.full(row)
        words = [place for place, item in enumerate(full) if item[0] == "text"]
        assert rows[row].tolist() == words
        for copy in range(row * prompt.images, (row + 1) * prompt.images):  # the same for every picture
            assert embeds[copy, :, 0].tolist() == [full[place][1] for place in words]
            assert mask[copy].tolist() == [float(place > full.index(("token", 0))) for place in words]


@settings(max_examples=150, deadline=None)
@given(st.data(), prompts(most=1))
def test_two_cuts_in_the_decoder(data: st.DataObject, prompt: Prompt) -> None:
    """What the first leaves is what arrives at the second: hidden states, positions, rows of the text."""
    count, start = prompt.runs.count, prompt.starts()
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
