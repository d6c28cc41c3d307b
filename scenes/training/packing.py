"""Packs many questions after one picture, each masked from the others and placed as if it were alone.

Layout of a row: [prefix][N visual tokens][newline + middle][block 1]…[block Q]. Without the masks the model
copies earlier answers and never looks at the picture.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from vtp.scenes.generator.pictures import KINDS, Picture, Question, ask
from vtp.scenes.training.folder import BOS, EOS, PAD, build_tokenizer

SKIP = -100
_SHARES = {  # of each kind: those with more are learned last
    (4, "chat"): (0.2, 0.14, 0.42, 0.24),
    (6, "full"): (0.08, 0.07, 0.15, 0.1, 0.25, 0.35),
    (6, "chat"): (0.1, 0.08, 0.24, 0.12, 0.2, 0.26),
}
STYLES = ("bare", "full", "chat")


@cache
def _tokenizer() -> Tokenizer:
    return build_tokenizer(reads=True)  # all ids of the other tokenizer are the same here


@lru_cache(maxsize=20000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of `text`, without BOS."""
    return tuple(_tokenizer().encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class Packed:
    """A batch of packed text.

    prefix [B, P], middle [B, M], blocks [B, Q, L] token ids; labels [B, Q, L]: the next token where it
    belongs to an answer, else SKIP; kinds [B, Q]: index of the (last) question's kind.
    """

    prefix: Tensor
    middle: Tensor
    blocks: Tensor
    labels: Tensor
    kinds: Tensor


def pack(
    pictures: list[Picture],
    questions: int,
    style: str,
    rng: np.random.Generator,
    kinds: tuple[str, ...] = KINDS,
) -> Packed:
    """Ask `questions` fresh questions of `kinds` about every picture, in the given style (one of `STYLES`).

    "bare" ends in the key word and "full" in the chat suffix; "chat" adds text of random length before and
    after the picture, earlier turns, and questions without the blank before the question mark.
    """
    system, between, turns = _chat_lengths(rng) if style == "chat" else (0, 0, 1)
    rows, asked_kinds, shares = [], [], _SHARES.get((len(kinds), style))
    for picture in pictures:
        for _ in range(questions):
            asked = [ask(picture, str(rng.choice(kinds, p=shares)), rng) for _ in range(turns)]
            rows.append(_block(asked, style, bool(style == "chat" and rng.random() < 0.1), bool(between)))
            asked_kinds.append(kinds.index(asked[-1].kind))
    length = max(len(ids) for ids, _ in rows)
    blocks = np.full((len(rows), length), PAD)
    labels = np.full((len(rows), length), SKIP)
    for row, (ids, wanted) in enumerate(rows):
        blocks[row, : len(ids)], labels[row, : len(ids)] = ids, wanted
    shape = (len(pictures), questions, length)
    fill = [[_filler(n, rng) for _ in pictures] for n in (system, between)]
    prefix = [[BOS, *text, *encode(" USER: " if text else "USER: ")] for text in fill[0]]
    middle = [[*encode("\n"), *text] for text in fill[1]]
    return Packed(
        torch.tensor(prefix),
        torch.tensor(middle),
        torch.from_numpy(blocks).view(shape),
        torch.from_numpy(labels).view(shape),
        torch.tensor(asked_kinds).view(shape[:2]),
    )


def _chat_lengths(rng: np.random.Generator) -> tuple[int, int, int]:
    """Length of the system text, of the text between picture and question, and the number of turns."""
    system = int(rng.integers(1, 160)) if rng.random() < 0.5 else 0
    between = int(rng.integers(1, 60)) if rng.random() < 0.2 else 0
    return system, between, 2 if rng.random() < 0.2 else 1


def _block(asked: list[Question], style: str, tight: bool, spaced: bool) -> tuple[list[int], list[int]]:
    """Token ids of the turns, and at each position the next token where that belongs to an answer."""
    ids: list[int] = []
    learn: list[int] = []
    for turn, question in enumerate(asked):
        text = question.text.removesuffix(" ?") if style == "bare" else question.text + " ASSISTANT:"
        text = text.replace(" ?", "?") if tight else text
        lead = "USER: " if turn else (" " if spaced else "")
        prompt, answer = encode(lead + text), [*encode(" " + question.answer), EOS]
        learn += [SKIP] * (len(prompt) - 1) + answer + [SKIP]
        ids += [*prompt, *answer]
    return ids, learn


def _filler(length: int, rng: np.random.Generator) -> list[int]:
    """Random ordinary tokens: words and bytes, nothing special."""
    return [int(i) for i in rng.integers(EOS + 2, _tokenizer().get_vocab_size(), length)]


def masks(packed: Packed, visual: int, squeeze: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mask bool [1, 1, S, S] and positions [1, S] of rows with `visual` tokens of the picture.

    `squeeze` below 1 lets neighbouring visual tokens share positions, so that the picture takes up fewer:
    what the model reads off a picture must not hang on how far away its tokens stand.
    """
    before, after = packed.prefix.shape[1], packed.middle.shape[1]
    _, questions, length = packed.blocks.shape
    shared = before + visual + after
    block = torch.cat((torch.full((shared,), -1), torch.arange(questions).repeat_interleave(length)))
    causal = torch.ones(len(block), len(block), dtype=torch.bool).tril()
    visible = (block[None, :] == -1) | (block[None, :] == block[:, None])
    places = before + (torch.arange(visual) * squeeze).long()
    following = int(places[-1]) + 1 + torch.arange(after + length)
    positions = torch.cat(
        (torch.arange(before), places, following[:after], following[after:].repeat(questions))
    )
    return (causal & visible)[None, None], positions[None]
