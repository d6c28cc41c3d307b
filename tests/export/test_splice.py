"""The splice and the text cues against lists: several pictures in a row, rows of unequal length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtp.export.graphs.splice import Splice, TextCues

COUNT = 6  # N
PADDING = -1.0


@dataclass(frozen=True)
class Row:
    """A prompt's ids as numbers 0, 1, ...: `starts` are where pictures of `width` placeholders begin."""

    length: int
    starts: list[int]

    def spliced(self, width: int, tokens: list[list[int]]) -> list[tuple[float, int]]:
        """(name, position with all N there) of every token; the visual token t of picture i is 100 i + t."""
        found: list[tuple[float, int]] = []
        place = number = 0
        while place < self.length:
            if place in self.starts:
                image = self.starts.index(place)
                found += [(1000.0 + 100 * image + token, number + token) for token in tokens[image]]
                place, number = place + width, number + COUNT
            else:
                found.append((float(place), number))
                place, number = place + 1, number + 1
        return found


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[Row]]:
    """Placeholders of a picture, and rows that have the same number of pictures, with some text after all."""
    width, images = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows = []
    for _ in range(draw(st.integers(2, 3))):
        place, starts = 0, []
        for _ in range(images):
            place += draw(st.integers(0, 3))
            starts.append(place)
            place += width
        rows.append(Row(place + draw(st.integers(0, 4)), starts))
    return width, rows


def tensors(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """inputs_embeds [B,T,1] and image_start [B,I]."""
    longest = max(row.length for row in rows)
    padded = [[*map(float, range(row.length)), *[PADDING] * (longest - row.length)] for row in rows]
    return torch.tensor(padded).unsqueeze(2), torch.tensor([row.starts for row in rows])


@settings(max_examples=200, deadline=None)
@given(st.data(), batches())
def test_every_token_finds_its_place(data: st.DataObject, batch: tuple[int, list[Row]]) -> None:
    width, rows = batch
    keep = data.draw(st.integers(1, COUNT))
    choice = st.lists(st.integers(0, COUNT - 1), min_size=keep, max_size=keep, unique=True).map(sorted)
    kept = [[data.draw(choice) for _ in row.starts] for row in rows]
    text, start = tensors(rows)
    flat = torch.tensor([tokens for row in kept for tokens in row])
    images = torch.arange(len(rows[0].starts)).repeat(len(rows)).unsqueeze(1)
    visual = (1000.0 + 100 * images + flat).unsqueeze(2)
    for positions in ("compact", "original"):
        splice = Splice(width, COUNT, positions)
        embeds, numbers, following = splice(text, visual, start, flat)
        for place, row in enumerate(rows):
            wanted = row.spliced(width, kept[place])
            length, missing = len(wanted), text.shape[1] - row.length
            assert embeds[place, :length, 0].tolist() == [name for name, _ in wanted]
            assert embeds[place, length:, 0].tolist() == [PADDING] * missing
            original = [number for _, number in wanted]
            assert numbers[place, :length].tolist() == (original if splice.original else list(range(length)))
            after = row.length - len(row.starts) * (width - COUNT) if splice.original else length
            assert int(following[place]) - missing == after


@settings(max_examples=200, deadline=None)
@given(batches())
def test_text_is_what_is_no_picture_and_no_padding(batch: tuple[int, list[Row]]) -> None:
    width, rows = batch
    text, start = tensors(rows)
    lengths = torch.tensor([row.length for row in rows])
    embeds, mask, places = TextCues(width, COUNT)(text, start, lengths)
    images = len(rows[0].starts)
    assert embeds.shape[0] == mask.shape[0] == images * len(rows) and len(places) == len(rows)
    for row_number, row in enumerate(rows):
        whole = row.spliced(width, [list(range(COUNT))] * images)
        words = [(name, place) for place, (name, _) in enumerate(whole) if name < 1000]
        asked = [float(name > row.starts[0]) for name, _ in words]
        asked = asked if any(asked) else [1.0] * len(words)
        assert places[row_number, : len(words)].tolist() == [place for _, place in words]
        for copy in range(row_number * images, (row_number + 1) * images):
            assert embeds[copy, : len(words), 0].tolist() == [name for name, _ in words]
            assert mask[copy].tolist() == asked + [0.0] * (mask.shape[1] - len(words))
