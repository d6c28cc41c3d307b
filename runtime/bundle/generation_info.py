"""What a model's own generation settings ask of every answer, as the manifest keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GenerationInfo:
    """What the model's generation_config asks of every answer, greedy or sampled; the defaults ask nothing.

    Names and meaning are those of transformers' `GenerationConfig`, and lengths count as there: with all N
    visual tokens of every picture. `min_length` is 0 where `min_new_tokens` stands in its place.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] = field(default_factory=list)
    min_length: int = 0
    min_new_tokens: int = 0
    forced_eos_token_id: list[int] = field(default_factory=list)
    suppress_tokens: list[int] = field(default_factory=list)
    begin_suppress_tokens: list[int] = field(default_factory=list)
