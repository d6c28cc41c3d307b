"""A tokenizer for full-size shapes: their special tokens at their ids, and enough English for a prompt.

Its other ids have text as well, for a random model chooses any of them: a server streams text, and where a
token has none, nothing shows when it came, nor whether two answers differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ENGLISH = (
    "What is in the picture? Describe the image in detail. How many people are there, and what are they "
    "doing? Is the light on the left green or red? Read the text on the sign. Answer the question using a "
    "single word or phrase. USER: ASSISTANT: User: Assistant: system user assistant You are a helpful "
    "assistant. The picture shows a small white dog and two children playing with a ball in a park."
)


# Two line ends are one piece of SmolLM2's vocabulary; llama.cpp puts it in front of SmolVLM's whole picture.
_BLANK_LINE = ("Ċ", "Ċ")


def byte_level_tokenizer(special: Mapping[str, int], size: int) -> Any:
    """A byte-level BPE of `size` pieces: the shape's special tokens at their ids, a few hundred of English.

    The ids in between are pieces that no text is cut into: a blank and the id itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    learner.train_from_iterator([_ENGLISH] * 4, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [*(tuple(pair) for pair in learnt["merges"]), _BLANK_LINE]
    pieces = [*sorted(learnt["vocab"], key=learnt["vocab"].__getitem__), "".join(_BLANK_LINE)]
    taken = set(special.values())
    free = (number for number in range(size) if number not in taken)
    vocabulary = {piece: next(free) for piece in pieces}
    rest = {f"Ġ{number}": number for number in free}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, **special, **rest}, merges=merges))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return tokenizer
