"""One answer while it is written: token by token, until an end token, a stop string or a full cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vtp.engines import VtpError
from vtp.runtime.bundle.manifest import GenerationInfo, Manifest
from vtp.runtime.constrained.constraint import ConstrainedRules
from vtp.runtime.generation.logits_rules import LogitsRules, written_out
from vtp.runtime.generation.logprobs import LogprobRecorder
from vtp.runtime.generation.request import Request
from vtp.runtime.generation.stopping import CANCELLED
from vtp.runtime.prompt.prompter import Detokenizer, Prompter
from vtp.runtime.result import Result, VisualTokens


class Answer:
    """What a request gets, and where its next token goes: `token` at `position`.

    `add` a step's logits, ask whether it `ends`, go on or `finish`. `begun` says whether `result` means
    anything yet.
    """

    def __init__(self, request: Request, manifest: Manifest, prompter: Prompter) -> None:
        self.request = request
        self.result = _empty(request, manifest)
        self.begun = False
        self.position = 0
        self._ends = manifest.text.eos_token_ids
        self._longest = manifest.model.max_length
        self._manifest = manifest
        self._detokenizer = Detokenizer(prompter.tokenizer, prompter.decoding, request.skip_special_tokens)
        self._constraint = request.constraint
        own = _rules(request, manifest)
        self._rules = own if self._constraint is None else ConstrainedRules(self._constraint, own)
        self._logprobs: LogprobRecorder | None = None
        if request.logprobs is not None:
            self.result.logprobs = []
            self._logprobs = LogprobRecorder(request.logprobs, prompter.token_bytes, self.result.logprobs)

    @property
    def token(self) -> int:
        """The last one that was chosen."""
        return self.result.token_ids[-1]

    @property
    def stopped(self) -> bool:
        """Whether the text itself has come to its end."""
        return self.token in self._ends or self.request.stops.hit or self._complete

    @property
    def _complete(self) -> bool:
        """Whether the form that was asked for leaves nothing more to write."""
        return self._constraint is not None and self._constraint.complete

    def begin(self, kept: np.ndarray | None, position: int, later: np.ndarray | None = None) -> None:
        """Note what the prompt's stages gave: the kept tokens [pictures,K], if any were chosen, and where
        the first new token goes; `later` [1,K'] those that a second cut left."""
        if (tower := self.result.timings.tower) is not None:
            self.result.tower = {**(self.result.tower or {}), **tower}
        if kept is not None:
            self._check_kept(kept, self.request.keep)
            rows = kept.tolist()
            self.result.kept = rows[0] if len(rows) == 1 else rows
            self.result.kept_per_frame = kept_per_frame(self._manifest, self.result.kept)
        if later is not None and self.result.then is not None:
            self._check_kept(later, self.result.then["tokens"])
            self.result.then["kept"] = later[0].tolist()
        self.position = position
        self.begun = True

    def _check_kept(self, kept: np.ndarray, keep: int) -> None:
        """What the result says of the tokens must be so; a merged token has the index -1."""
        count = self._manifest.visual.count
        if kept.shape[-1] != keep or kept.min() < -1 or kept.max() >= count:
            raise VtpError(
                f"the bundle's graphs kept {kept.shape[-1]} tokens up to number {kept.max()}, and its "
                f"manifest says {keep} of {count}; export it again"
            )

    def add(self, logits: np.ndarray) -> str:
        """Choose a token by logits [V]; returns the text that is certain now."""
        token = self.request.sampler.pick(logits, self._rules)
        if self._rules is not None:
            self._rules.add(token)
        self._count(token)
        if token in self._ends:
            return ""
        text = self._detokenizer.push(token)
        if self._logprobs is not None:
            self._logprobs.add(token, logits, text)
        return self._write(self.request.stops.push(text))

    def ends(self, room: int) -> bool:
        """Whether it is over, with a cache that has `room` for more tokens; the result then says why."""
        request, result = self.request, self.result
        # With original positions a small keep-count leaves room in the caches past the last position.
        full = room < 1 or self.position >= self._longest
        if self.token in self._ends:
            result.finish_reason = "eos"
        elif request.stops.hit or self._complete:
            result.finish_reason = "stop"
        elif full or len(result.token_ids) >= request.max_new_tokens:
            result.finish_reason = "length"
        else:
            return False
        return True

    def take(self, logits: np.ndarray, room: int) -> tuple[str, bool]:
        """`add`, and `finish` if it `ends`: the text that is certain now, and whether it is over."""
        piece = self.add(logits)
        over = self.ends(room)
        return (piece + self.finish() if over else piece), over

    def interrupt(self, reason: str) -> None:
        """Note that it ends here, and why."""
        self.begun = True
        self.result.finish_reason = reason
        self.result.timings.total = self.request.clock.ms

    def finish(self) -> str:
        """Returns the text that was held back."""
        stops = self.request.stops
        if stops.hit:
            return ""
        piece = self._write(stops.push(self._detokenizer.finish()) + stops.finish())
        if stops.hit:
            self.result.finish_reason = "stop"
        elif self._logprobs is not None:
            self._logprobs.finish()
        return piece

    def _write(self, piece: str) -> str:
        self.result.raw_text += piece
        if self._logprobs is not None:
            self._logprobs.show(len(self.result.raw_text))
        return piece

    def _count(self, token: int) -> None:
        """Note a token and the time it came."""
        now = self.request.clock.ms
        self.result.token_ids.append(token)
        timings = self.result.timings
        if len(self.result.token_ids) == 1:
            timings.ttft = now
        else:
            timings.tpot = (now - timings.ttft) / (len(self.result.token_ids) - 1)
        timings.total = now


def _rules(request: Request, manifest: Manifest) -> LogitsRules | None:
    """What the model's settings ask of this answer's logits; None: nothing, and then it costs nothing."""
    if request.generation == GenerationInfo():
        return None
    ids = written_out(request.prompt.ids, manifest.text.image_token_id, manifest.runs)
    return LogitsRules(request.generation, ids, manifest.text.eos_token_ids, request.max_new_tokens)


def _empty(request: Request, manifest: Manifest) -> Result:
    visual, pictures = manifest.visual, len(request.pictures)
    kept: list[Any] = list(range(visual.count)) if request.keep == visual.count else []
    return Result(
        raw_text="",
        token_ids=[],
        visual_tokens=VisualTokens(pictures * visual.count, pictures * request.keep),
        kept=kept if pictures == 1 else [list(kept) for _ in range(pictures)],
        timings=request.timings,
        prompt_tokens=request.prompt.text_tokens,
        finish_reason=CANCELLED,
        tower=manifest.tower.to_json() if manifest.tower and pictures else None,
        restore=manifest.method.restore,
        then=_then(request, manifest) if pictures else None,
        kept_per_frame=kept_per_frame(manifest, kept) if pictures else None,
    )


def _then(request: Request, manifest: Manifest) -> dict[str, Any] | None:
    then = manifest.method.then
    return None if then is None else {**then.to_json(manifest.visual.keep, request.keep), "kept": []}


def kept_per_frame(manifest: Manifest, kept: Sequence[int]) -> list[int] | None:
    """How many patches of each frame are among the tokens `kept` of a video; None for a picture.

    What else a video has, such as a frame's CLS, counts for no frame.
    """
    frame, frames = manifest.visual.frame, manifest.image.frames
    if frame is None or frames is None:
        return None
    counts = [0] * frames
    for token in kept:
        number, patch = divmod(token - frame.first, frame.step)
        if 0 <= number < frames and patch < frame.grid[0] * frame.grid[1]:
            counts[number] += 1
    return counts
