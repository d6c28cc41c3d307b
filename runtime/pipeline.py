"""The pipeline: a picture and a prompt in, text out, over whatever stages a bundle lists."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from vtp.engines import AUTO, Choice, UsageError, VtpError, choose_engine
from vtp.runtime.bundle import Bundle, open_bundle
from vtp.runtime.images import ImageSource, load_image
from vtp.runtime.opening import Opening
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Result, Timings, VisualTokens
from vtp.runtime.sampling import Sampler
from vtp.runtime.stages import Seen, StageRunner
from vtp.runtime.text import Detokenizer, Prompt, Prompter, StopStrings

Messages = Sequence[dict[str, Any]]
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class _Request:
    """Everything one generation needs, checked."""

    pixels: np.ndarray
    prompt: Prompt
    keep: int
    max_new_tokens: int
    sampler: Sampler
    stops: StopStrings
    timings: Timings
    started: float


class Pipeline:
    """Answers prompts about pictures from one bundle.

    One Pipeline serves one thread and one generation at a time: a second call while one runs (or while a
    stream is open) raises VtpError. Use one Pipeline per thread. A context manager; `close()` frees the
    graphs.
    """

    def __init__(
        self,
        bundle: Bundle,
        choice: Choice,
        threads: int | None = None,
        reuse_image: bool = False,
        opening: Opening | None = None,
    ) -> None:
        """Open every graph of a verified bundle; most users call `Pipeline.load`."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.engine = choice.engine
        self.decisions = choice.decisions
        self._prompter = Prompter(self.manifest.text, bundle.path("tokenizer.json"))
        self._runner: StageRunner | None = StageRunner(bundle, choice.engine, threads, opening)
        self._busy = threading.Lock()
        self._reuse_image = reuse_image
        self._last_pixels: np.ndarray | None = None
        self._seen: Seen = {}

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        engine: str = AUTO,
        threads: int | None = None,
        check_hashes: bool = False,
        reuse_image: bool = False,
        opening: Opening | None = None,
    ) -> Pipeline:
        """Open a bundle folder.

        engine        "auto" (the best that can run here), or one by name, such as "ort-cpu"
        threads       CPU threads of one operator; None: all cores
        check_hashes  also compare every file's sha256 with the manifest (reads all weights)
        reuse_image   keep what the image stages gave, for a next prompt about the very same picture (their
                      timings are then near 0; off by default, so that timings mean what they say)
        opening       where TensorRT's engines lie, and what CUDA may do (see `Opening`)

        Raises VtpError for a bundle that is damaged or cannot run here, UsageError for a bad argument.
        """
        threads = None if threads is None else _whole("threads", threads)
        opened = open_bundle(bundle, check_hashes)
        manifest = opened.manifest
        choice = choose_engine(engine, manifest.dtype, target=manifest.target)
        return cls(opened, choice, threads, reuse_image, opening)

    def generate(
        self,
        image: ImageSource,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Result:
        """Answer a prompt about a picture.

        image           path, bytes, PIL image or uint8 RGB array [H,W,3]
        prompt          the user's words; or
        messages        several turns, as chat templates take them: {"role": ..., "content": str or a list of
                        {"type": "image"} and {"type": "text", "text": ...}}; without an image entry
                        the picture joins the first user turn
        max_new_tokens  at most so many tokens are generated
        keep_tokens     one of the bundle's keep-counts; None: its default
        budget_ms       instead: the largest keep-count whose time to first token, as vtp-calib measured it
                        here, is within so many milliseconds
        temperature     0 is greedy; otherwise sample, from the `top_p` nucleus, repeatable with `seed`
        stop            strings that end the answer and are not part of it

        Raises UsageError for a bad argument and VtpError for a picture or prompt that cannot be served.
        """
        stream = self.stream(
            image,
            prompt,
            messages=messages,
            max_new_tokens=max_new_tokens,
            keep_tokens=keep_tokens,
            budget_ms=budget_ms,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        image: ImageSource,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Stream:
        """Like `generate`, piece by piece: iterate for text, then read `.result`; `.cancel()` ends it."""
        started, timings = time.perf_counter(), Timings()
        request = _Request(
            pixels=self._pixels(image, timings),
            prompt=self._encode(prompt, messages, timings),
            keep=self._keep(keep_tokens) if budget_ms is None else self._keep_within(budget_ms, keep_tokens),
            max_new_tokens=_whole("max_new_tokens", max_new_tokens),
            sampler=Sampler(temperature=temperature, top_p=top_p, seed=seed),
            stops=StopStrings(() if stop is None else stop),
            timings=timings,
            started=started,
        )
        self._check_room(request)
        return Stream(self, request)

    def warmup(self) -> None:
        """Run every stage once on a blank picture, so that the first answer does not pay for set-up."""
        spec = self.manifest.image
        blank = Image.new("RGB", (spec.image_width or 64, spec.image_height or 64))
        for keep in self.manifest.visual.keep:
            self.generate(blank, "warm up", keep_tokens=keep, max_new_tokens=2)

    def close(self) -> None:
        """Free every graph; the pipeline cannot be used afterwards."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pixels(self, image: ImageSource, timings: Timings) -> np.ndarray:
        with timings.measure("preprocess"):
            return preprocess(load_image(image), self.manifest.image)

    def _encode(self, prompt: str | None, messages: Messages | None, timings: Timings) -> Prompt:
        if (prompt is None) == (messages is None):
            raise UsageError("give either a prompt or messages, not both and not neither")
        with timings.measure("tokenize"):
            if prompt is not None:
                return self._prompter.encode(self._prompter.messages_for(prompt))
            assert messages is not None  # by the check above
            return self._prompter.encode(_with_image(messages))

    def _keep(self, wanted: int | None) -> int:
        visual = self.manifest.visual
        keep = visual.default_keep if wanted is None else wanted
        if keep not in visual.keep or not _is_whole(keep):
            held = ", ".join(map(str, visual.keep))
            raise UsageError(
                f"keep_tokens {wanted!r} is not in this bundle, which holds {held}; "
                "choose one of them, or export with --keep-tokens"
            )
        return int(keep)

    def _keep_within(self, budget_ms: float, keep_tokens: int | None) -> int:
        """The largest keep-count within a time, from what vtp-calib wrote into the manifest."""
        if keep_tokens is not None:
            raise UsageError("give either keep_tokens or budget_ms, not both")
        known = self.manifest.calibration
        if known.get("engine") != self.engine:
            made = f"measured on {known['engine']}" if "engine" in known else "not calibrated"
            raise UsageError(
                f"budget_ms needs times measured on {self.engine}; this bundle is {made}; run: vtp-calib keep"
            )
        times = {int(keep): tried["ttft_ms"] for keep, tried in known["tried"].items()}
        within = [keep for keep, time_ms in times.items() if time_ms <= budget_ms]
        if not within:
            raise UsageError(
                f"budget_ms {budget_ms:g} is too little for every keep-count; the fastest takes "
                f"{min(times.values()):.1f} ms"
            )
        return self._keep(max(within))

    def _check_room(self, request: _Request) -> None:
        """Refuse a prompt that leaves no room for an answer, before anything runs."""
        text = request.prompt.text_tokens
        needed = text + self.manifest.visual.count + 1
        if needed > self.manifest.model.max_length:
            raise VtpError(
                f"the prompt has {text} tokens; beside {self.manifest.visual.count} visual tokens this "
                f"bundle has room for {self.manifest.model.max_length - self.manifest.visual.count - 1}; "
                "shorten it, or export with a larger --max-length"
            )

    def _seen_of(self, pixels: np.ndarray) -> Seen | None:
        """What the image stages gave for these pixels, to be read and added to; None when not asked for."""
        if not self._reuse_image:
            return None
        if self._last_pixels is None or not np.array_equal(self._last_pixels, pixels):
            self._last_pixels, self._seen = pixels, {}
        return self._seen

    def _claim(self) -> StageRunner:
        runner = self._check_open()
        if not self._busy.acquire(blocking=False):
            raise VtpError(
                "this pipeline is busy: it serves one generation at a time; finish or cancel the open "
                "stream, or load one Pipeline per thread"
            )
        return runner

    def _check_open(self) -> StageRunner:
        if self._runner is None:
            raise VtpError("this pipeline is closed; load the bundle again")
        return self._runner


class Stream:
    """The pieces of one answer, as they become certain. Iterate it once, then read `result`."""

    def __init__(self, pipeline: Pipeline, request: _Request) -> None:
        # The generator knows the answer but not this stream, so no cycle keeps an abandoned stream alive:
        # when the last reference goes, the pipeline is free.
        self._answer = _Answer(pipeline, request)
        self._pieces = self._answer.pieces()

    @property
    def result(self) -> Result:
        """The whole answer so far; complete once the iteration ended. VtpError before the first piece."""
        if self._answer.result is None:
            raise VtpError("this stream has not started; iterate it first")
        return self._answer.result

    def cancel(self) -> None:
        """End the answer before the next token; `result` holds what there is. Safe from another thread."""
        self._answer.cancelled = True

    def close(self) -> None:
        """Give the pipeline back without finishing."""
        self._pieces.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


class _Answer:
    """One generation under way: its pieces of text, and the result that they add up to."""

    def __init__(self, pipeline: Pipeline, request: _Request) -> None:
        self.cancelled = False
        self.result: Result | None = None
        self._pipeline = pipeline
        self._request = request

    def pieces(self) -> Generator[str, None, None]:
        """Generate; a generator, since leaving it by any door frees the pipeline."""
        runner = self._pipeline._claim()
        try:
            yield from self._generate(runner)
        finally:
            self._pipeline._busy.release()

    def _generate(self, runner: StageRunner) -> Iterator[str]:
        request = self._request
        result = self._empty_result()
        if self.cancelled:
            self.result = result
            return
        logits, position = self._prefill(runner, result)
        self.result = result
        detokenizer, stops = Detokenizer(self._pipeline._prompter), request.stops
        while True:
            token = request.sampler.pick(logits)
            self._count_token(result, token)
            if token in self._pipeline.manifest.text.eos_token_ids:
                result.finish_reason = "eos"
                break
            piece = stops.push(detokenizer.push(token))
            if piece:
                result.text += piece
                yield piece
            if reason := self._reason_to_stop(result, runner.room(), position):
                result.finish_reason = reason
                break
            logits = runner.step(request.keep, token, position)
            position += 1
        if not stops.hit:
            if piece := stops.push(detokenizer.finish()) + stops.finish():
                result.text += piece
                yield piece
            if stops.hit:
                result.finish_reason = "stop"

    def _reason_to_stop(self, result: Result, room: int, position: int) -> str | None:
        """Why the answer ends here; None to go on with a token at `position` while caches have `room`."""
        if self._request.stops.hit:
            return "stop"
        if self.cancelled:
            return "cancelled"
        self._pipeline._check_open()
        # With original positions a small keep-count leaves room in the caches past the last position.
        full = room < 1 or position >= self._pipeline.manifest.model.max_length
        return "length" if full or len(result.token_ids) >= self._request.max_new_tokens else None

    def _count_token(self, result: Result, token: int) -> None:
        """Note a token and the time it came."""
        now = (time.perf_counter() - self._request.started) * 1e3
        result.token_ids.append(token)
        timings = result.timings
        if len(result.token_ids) == 1:
            timings.ttft = now
        else:
            timings.tpot = (now - timings.ttft) / (len(result.token_ids) - 1)
        timings.total = now

    def _prefill(self, runner: StageRunner, result: Result) -> tuple[np.ndarray, int]:
        """Run the image and prompt stages; returns the first logits and the first new token's position."""
        request = self._request
        prompt, seen = request.prompt, self._pipeline._seen_of(request.pixels)
        values = runner.prefill(
            request.keep, request.pixels, prompt.ids, prompt.image_start, request.timings, seen
        )
        if "keep_indices" in values:
            result.kept = values["keep_indices"].numpy()[0].tolist()
        return values["logits"].numpy()[0, 0], int(values["next_position"].numpy()[0])

    def _empty_result(self) -> Result:
        request, visual = self._request, self._pipeline.manifest.visual
        return Result(
            text="",
            token_ids=[],
            visual_tokens=VisualTokens(visual.count, request.keep),
            kept=list(range(visual.count)) if request.keep == visual.count else [],
            timings=request.timings,
            prompt_tokens=request.prompt.text_tokens,
            finish_reason="cancelled",
        )


def _with_image(messages: Messages) -> Messages:
    """Put the picture before the first user turn's words where no turn says where it belongs."""
    if not isinstance(messages, Sequence) or not all(isinstance(turn, dict) for turn in messages):
        return messages  # malformed: the prompter says how
    parts = [part for turn in messages if isinstance(turn.get("content"), list) for part in turn["content"]]
    if any(isinstance(part, dict) and part.get("type") == "image" for part in parts):
        return messages
    turns = [dict(turn) for turn in messages]
    for turn in turns:
        if turn.get("role") == "user":
            content = turn.get("content")
            words = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if isinstance(words, list):  # anything else is malformed, as above
                turn["content"] = [{"type": "image"}, *words]
            break
    return turns


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole(name: str, value: int) -> int:
    if not _is_whole(value) or value < 1:
        raise UsageError(f"{name} {value!r} is not a whole number of at least 1")
    return int(value)
