"""What a generation gives back: the text, what was dropped, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class VisualTokens(NamedTuple):
    """Visual tokens before and after pruning."""

    before: int
    after: int


@dataclass
class Timings:
    """Milliseconds per stage of one generation.

    `stages` sums every run up to the first token; `ttft` is the time from the call to the first token (0 if
    there is none), `tpot` the mean time of every further token, `total` all of it. Of a stream, the time
    between the call and its first `next()` is not counted. Of a pipeline that keeps something of earlier
    answers, `reused_stages` names the image stages whose outputs were taken from its vision feature cache,
    and `reused_tokens` counts the prompt's tokens, visual ones among them, that were not read again; `tower`
    says how many rows its vision tower recomputed of a camera's picture.
    """

    stages: dict[str, float] = field(default_factory=dict)
    ttft: float = 0.0
    tpot: float = 0.0
    total: float = 0.0
    reused_stages: list[str] = field(default_factory=list)
    reused_tokens: int = 0
    tower: dict[str, float] | None = None

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time that the body takes to a stage."""
        start = time.perf_counter()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + (time.perf_counter() - start) * 1e3

    def to_dict(self) -> dict[str, float]:
        """Stage name -> milliseconds, then ttft, tpot and total."""
        rows = {**self.stages, "ttft": self.ttft, "tpot": self.tpot, "total": self.total}
        return {name: round(value, 3) for name, value in rows.items()}


@dataclass(frozen=True)
class TokenLogprob:
    """One token and how likely the model found it.

    token    its text; the sign U+FFFD stands for parts of characters
    id       its number
    bytes    what it is in UTF-8: joined, those of an answer are its raw_text, also where a character has
             several tokens (hidden special tokens are not part of it, nor, with some tokenizers, a first
             word's leading space)
    logprob  natural logarithm of its probability: see `vtp.runtime.generation.logprobs`
    top      the most likely tokens at its place, most likely first, if they were asked for
    """

    token: str
    id: int
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `vtp-run --json` prints for a token."""
        return {**self._own(), "top": [other._own() for other in self.top]}

    def _own(self) -> dict[str, Any]:
        return {"token": self.token, "id": self.id, "bytes": list(self.bytes), "logprob": self.logprob}


# Why an answer has no text, by its finish_reason.
_EARLY = {
    "stop": "a stop string came first; leave it out, or give another",
    "timeout": "the time was over before the first word; give a larger timeout_ms",
    "cancelled": "it was cancelled before the first word",
}


@dataclass
class Result:
    """One answer.

    raw_text        the answer, without special tokens: what the pieces of its stream join to
    token_ids       the generated ids, an end-of-sequence id included
    visual_tokens   (before, after), of all pictures together
    kept            indices of the kept visual tokens, raster order, within 0 .. before - 1; of a prompt with
                    several pictures one such list for each, within the picture's own tokens
    kept_per_frame  of a video: how many of each frame's patches were kept, in the frames' order; else None
    timings         milliseconds per stage: see Timings
    prompt_tokens   text tokens of the prompt, without the picture's
    finish_reason   "eos", "stop" (a stop string, or the response format is complete), "length"
                    (max_new_tokens or the cache is full), "timeout" (timeout_ms), "cancelled"
    tower           {"name", "rows", "of"} of a bundle whose vision tower works on fewer rows; else, and of a
                    prompt without a picture, None. With stream_reuse, rows are those recomputed of this
                    picture, and "cosine" says how much it was like the reference picture, unless it was
                    computed whole
    restore         whether kept visual tokens drew the attention of the dropped ones (vtp-export --restore)
    then            {"name", "layer", "tokens", "kept"} of a bundle that drops some of the kept tokens inside
                    the decoder (vtp-export --then): before that layer, how many are left, and which; else
                    None
    logprobs        with the option of that name, an entry for each of `token_ids` that is part of the text:
                    not for the one that ended it, nor for what a stop string cut off
    """

    raw_text: str
    token_ids: list[int]
    visual_tokens: VisualTokens
    kept: list[Any]
    timings: Timings
    prompt_tokens: int
    finish_reason: str
    tower: dict[str, Any] | None = None
    restore: bool = False
    then: dict[str, Any] | None = None
    logprobs: list[TokenLogprob] | None = None
    kept_per_frame: list[int] | None = None

    @property
    def text(self) -> str:
        """The answer without the space that many models begin their first word with; `raw_text` has it."""
        return self.raw_text.removeprefix(" ")

    @property
    def why_empty(self) -> str | None:
        """In a few words, if the text is empty or all spaces: why, and what to do; else None."""
        if self.raw_text.strip():
            return None
        count = len(self.token_ids)
        if self.finish_reason == "eos" and count == 1:
            return "the model ended its answer with its first token; ask in other words, or keep more tokens"
        if self.finish_reason in ("eos", "length"):
            tokens = "token has" if count == 1 else "tokens have"
            return f"its {count} {tokens} no text that is shown; skip_special_tokens=False shows special ones"
        return _EARLY.get(self.finish_reason, self.finish_reason)

    def to_json(self) -> dict[str, Any]:
        """The object that `vtp-run --json` prints."""
        logprobs = {} if self.logprobs is None else {"logprobs": [one.to_json() for one in self.logprobs]}
        frames = {} if self.kept_per_frame is None else {"kept_per_frame": self.kept_per_frame}
        return {
            "text": self.text,
            "raw_text": self.raw_text,
            "token_ids": self.token_ids,
            "visual_tokens": self.visual_tokens._asdict(),
            "tower": self.tower,
            **({"restore": True} if self.restore else {}),
            "kept": self.kept,
            **({} if self.then is None else {"then": self.then}),
            **frames,
            "timings": self.timings.to_dict(),
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            **logprobs,
        }
