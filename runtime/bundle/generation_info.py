"""What a model's own generation settings ask of every answer, as the manifest keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtp.runtime.generation.arguments import is_penalty


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


def generation_problem(asked: GenerationInfo, vocabulary: int) -> str:
    """What no answer could follow of a manifest's settings, for a model of so many tokens; "" if nothing."""
    penalty = asked.repetition_penalty
    if not is_penalty(penalty):
        return f"manifest.generation.repetition_penalty {penalty} is not above 0 and finite in float32"
    for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens"):
        if getattr(asked, name) < 0:
            return f"manifest.generation.{name} is negative"
    if not all(asked.bad_words_ids):
        return "manifest.generation.bad_words_ids holds an empty word"
    ids = [*asked.forced_eos_token_id, *(token for word in asked.bad_words_ids for token in word)]
    exist = all(0 <= token < vocabulary for token in ids)
    return "" if exist else "manifest.generation names tokens that do not exist"
