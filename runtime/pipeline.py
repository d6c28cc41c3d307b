"""The pipeline: a picture and a prompt in, text out, over whatever stages a bundle lists."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vtp.engines import AUTO, Choice, UsageError, VtpError, choose_engine
from vtp.engines.disk.whole import undisturbed
from vtp.engines.tensorrt.library import LIBRARIES
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.generation.answer import Answer, Request
from vtp.runtime.generation.arguments import is_number, is_whole, shown, whole
from vtp.runtime.generation.batch import about, batches, check_lists, each_prompt, write_together
from vtp.runtime.generation.logits_rules import with_penalty
from vtp.runtime.generation.sampling import Sampler
from vtp.runtime.generation.stopping import CANCELLED, Clock, Interrupted, StopSignal
from vtp.runtime.machine.conditions import Conditions, conditions
from vtp.runtime.media.images import ImageSource
from vtp.runtime.media.pictures import Pictures
from vtp.runtime.media.videos import VideoSource
from vtp.runtime.opening import Opening
from vtp.runtime.prompt.prompter import Prompt, Prompter, StopStrings
from vtp.runtime.result import Result, Timings
from vtp.runtime.stages.prefix_cache import ImageCache, Prefix, check_prefix
from vtp.runtime.stages.runner import StageRunner

Messages = Sequence[dict[str, Any]]
Images: TypeAlias = "ImageSource | VideoSource | Sequence[ImageSource]"  # of one prompt
DEFAULT_NEW_TOKENS = 128


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
        image_cache: int = 0,
        reuse_prompt: bool = False,
        opening: Opening | None = None,
    ) -> None:
        """Open every graph of a verified bundle; most users call `Pipeline.load`."""
        if reuse_prompt:
            check_prefix(bundle)
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.engine = choice.engine
        self.decisions = choice.decisions
        self._prompter = Prompter(
            self.manifest.text, bundle.path("tokenizer.json"), self.manifest.model.max_length
        )
        self._prompter.check()
        prefix = Prefix() if reuse_prompt else None
        self._runner: StageRunner | None = StageRunner(bundle, choice.engine, threads, opening, prefix)
        self._busy = threading.Lock()
        self._threads = threads
        self._images = ImageCache(image_cache)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        engine: str = AUTO,
        threads: int | None = None,
        check_hashes: bool = False,
        image_cache: int = 0,
        reuse_prompt: bool = False,
        opening: Opening | None = None,
    ) -> Pipeline:
        """Open a bundle folder.

        engine        "auto" (the best that can run here), or one by name, such as "ort-cpu"
        threads       CPU threads of one operator; None: all cores
        check_hashes  also compare every file's sha256 with the manifest (reads all weights)
        image_cache   keep what the image stages gave for the pictures of so many prompts, for a next prompt
                      about any of them; `image_cache_bytes` says how much memory that takes
        reuse_prompt  read a prompt on from what it shares with the one before (and its answer): a picture and
                      the turns of a conversation are then read once
        opening       where TensorRT's engines lie, and what CUDA may do (see `Opening`)

        `image_cache` and `reuse_prompt` change timings, and the last bits of logits (the former where several
        pictures would run together): both are off unless asked for.

        Raises VtpError for a bundle that is damaged or cannot run here, UsageError for a bad argument.
        """
        threads = None if threads is None else whole("threads", threads)
        if not is_whole(image_cache) or image_cache < 0:
            raise UsageError(
                f"image_cache {shown(image_cache)} is not a number of prompts; give 0 (off) or more"
            )

        def load(folder: Path) -> Pipeline:
            opened = open_bundle(folder, check_hashes)
            choice = choose_engine(engine, opened.manifest.dtype, target=opened.manifest.target)
            return cls(opened, choice, threads, image_cache, reuse_prompt, opening)

        return undisturbed(load)(bundle)  # one bundle, even while another takes its place

    def generate(
        self,
        image: Images,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        allow_special_tokens: bool = False,
        timeout_ms: float | None = None,
    ) -> Result:
        """Answer a prompt about a picture, or about several; with a bundle made for videos, about one.

        image           path, bytes, PIL image or uint8 RGB array [H,W,3]; or a list of such. A video is a
                        list of frames, a uint8 array [frames,H,W,3], a folder of pictures or a file (see
                        `vtp.runtime.media.videos`); of more frames than the bundle takes, so many are sampled
        prompt          the user's words; or
        messages        several turns, as chat templates take them: {"role": ..., "content": str or a list of
                        {"type": "image"} (or "video") and {"type": "text", "text": ...}}; without an image
                        entry the pictures join the first user turn
        max_new_tokens  at most so many tokens are generated
        keep_tokens     one of the bundle's keep-counts; None: its default
        budget_ms       instead: the largest keep-count whose time to first token, as vtp-calib measured it
                        here, is within so many milliseconds
        temperature     0 is greedy; otherwise sample, from the `top_p` nucleus, repeatable with `seed`
        repetition_penalty  above 1 makes tokens of the prompt and the answer so far less likely, as in
                        transformers; None: the model's own (see `Manifest.generation`), 1: off
        stop            strings that end the answer and are not part of it
        skip_special_tokens   False: special tokens that the model writes, such as boxes or document tags,
                        stay in the answer's text; the token that ends it never does
        allow_special_tokens  True: the texts may hold the model's special tokens, which then mean what they
                        mean in transformers' prompts; refused otherwise. The picture's own token always is
        timeout_ms      end the answer so many milliseconds after the call, with what there is and
                        finish_reason "timeout"; looked at before each stage and each token, so that a stage
                        that has begun ends first

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
            repetition_penalty=repetition_penalty,
            stop=stop,
            skip_special_tokens=skip_special_tokens,
            allow_special_tokens=allow_special_tokens,
            timeout_ms=timeout_ms,
        )
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        image: Images,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        allow_special_tokens: bool = False,
        timeout_ms: float | None = None,
    ) -> Stream:
        """Like `generate`, piece by piece: iterate for text, then read `.result`; `.cancel()` ends it.

        The time between this call and the first `next()` is counted neither in timings nor in `timeout_ms`.
        """
        clock = Clock()
        request = self._request(
            clock,
            StopSignal(clock, timeout_ms),
            image,
            prompt,
            messages,
            keep=self._keep(keep_tokens) if budget_ms is None else self._keep_within(budget_ms, keep_tokens),
            max_new_tokens=max_new_tokens,
            sampler=Sampler(temperature=temperature, top_p=top_p, seed=seed),
            repetition_penalty=repetition_penalty,
            stop=stop,
            skip_special_tokens=skip_special_tokens,
            allow_special_tokens=allow_special_tokens,
        )
        request.pictures.load(request.timings)
        clock.pause()
        return Stream(self, request)

    def generate_batch(
        self,
        images: Sequence[Images],
        prompts: Sequence[str] | None = None,
        *,
        messages: Sequence[Messages] | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        allow_special_tokens: bool = False,
        batch_size: int | None = None,
        timeout_ms: float | None = None,
    ) -> list[Result]:
        """Answer several prompts, each about its own picture (or list of pictures), in batches.

        Prompts may differ in length, and each answer ends where it would alone: greedy answers are those of
        `generate`. The keyword arguments are `generate`'s, for all prompts, but for

        messages    a conversation for each entry of `images`, instead of `prompts`
        seed        prompt number i, from 0, samples with seed + i
        batch_size  most pictures that go through the graphs together; None: as many as the bundle was made
                    for. Prompts with equal numbers of pictures run together.
        timeout_ms  of the whole call: answers that have not ended by then end so, those of batches that have
                    not begun without any text

        The timings of a result's stages are those of its batch. Raises as `generate` does, and says which
        prompt it is about: for all prompts before any is answered, but for pictures whose file begins well
        and turns out damaged when it is decoded, batch by batch.
        """
        clock, count = Clock(), check_lists(images, prompts, messages)
        stop_signal = StopSignal(clock, timeout_ms)
        most = self.batch_size
        together = most if batch_size is None else min(most, whole("batch_size", batch_size))
        keep = self._keep(keep_tokens) if budget_ms is None else self._keep_within(budget_ms, keep_tokens)
        requests = each_prompt(
            count,
            lambda place: self._request(
                clock,
                stop_signal,
                images[place],
                prompts[place] if prompts is not None else None,
                messages[place] if messages is not None else None,
                keep=keep,
                max_new_tokens=max_new_tokens,
                sampler=Sampler(temperature=temperature, top_p=top_p, seed=_later(seed, place)),
                repetition_penalty=repetition_penalty,
                stop=stop,
                skip_special_tokens=skip_special_tokens,
                allow_special_tokens=allow_special_tokens,
            ),
        )
        answers = [self._answer(request) for request in requests]
        with self._claimed() as runner:
            for places in batches(requests, together):
                for place in places:
                    with about(place, count):
                        requests[place].load()
                write_together(runner, keep, [answers[place] for place in places], self._images)
                for place in places:
                    requests[place].pictures.release()
        return [answer.result for answer in answers]

    @property
    def batch_size(self) -> int:
        """Most pictures whose prompts go through the bundle's graphs together."""
        return self._open_runner().rows_together

    @property
    def image_cache_bytes(self) -> int:
        """Memory that the image cache takes now, with the pictures of the last prompts."""
        return self._images.bytes

    @property
    def notes(self) -> list[str]:
        """What was asked for and could not be done on this machine, a line each: CUDA graphs refused."""
        return self._open_runner().notes

    def warmup(self) -> None:
        """Run every stage once on a blank picture, so that the first answer does not pay for set-up."""
        spec = self.manifest.image
        blank = [Image.new("RGB", (spec.image_width or 64, spec.image_height or 64))] * (spec.frames or 1)
        for keep in self.manifest.visual.keep:
            self.generate(blank, "warm up", keep_tokens=keep, max_new_tokens=2)

    def close(self) -> None:
        """Free every graph; the pipeline cannot be used afterwards."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
            self._images.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(
        self,
        clock: Clock,
        stop_signal: StopSignal,
        image: Images,
        prompt: str | None,
        messages: Messages | None,
        *,
        keep: int,
        max_new_tokens: int,
        sampler: Sampler,
        repetition_penalty: float | None,
        stop: str | Sequence[str] | None,
        skip_special_tokens: bool,
        allow_special_tokens: bool,
    ) -> Request:
        """Everything but the pixels, checked; errors that show without them come before any is decoded."""
        timings = Timings()
        pictures = self._pictures(image, timings)
        request = Request(
            pictures=pictures,
            prompt=self._encode(prompt, messages, len(pictures), allow_special_tokens, timings),
            keep=keep,
            max_new_tokens=whole("max_new_tokens", max_new_tokens),
            sampler=sampler,
            generation=with_penalty(self.manifest.generation, repetition_penalty),
            stops=StopStrings(() if stop is None else stop),
            timings=timings,
            clock=clock,
            stop_signal=stop_signal,
            skip_special_tokens=skip_special_tokens,
        )
        self._check_room(request)
        return request

    def _answer(self, request: Request) -> Answer:
        return Answer(request, self.manifest, self._prompter)

    def _pictures(self, image: Images, timings: Timings) -> Pictures:
        """The pictures of one prompt, or its video, checked and not yet decoded."""
        pictures = Pictures(image, self.manifest.image)
        if len(pictures) > 1:
            self._check_several(len(pictures))
        pictures.check(timings)
        return pictures

    def _check_several(self, count: int) -> None:
        """Refuse several pictures where a graph was made for one."""
        if self.engine in LIBRARIES:
            raise UsageError(
                f"engines for {self.engine} are built for one picture per prompt, not {count}; choose an "
                "ort engine"
            )
        single = self.manifest.single_picture_stages
        if any(stage.keep is None for stage in single):
            raise UsageError(
                f"this bundle takes one picture per prompt, not {count}: its graphs, of family "
                f"{self.manifest.model.family}, were made for one"
            )
        if single:
            raise UsageError(
                f"method {self.manifest.method.name} chooses inside the decoder and takes one picture per "
                f"prompt, not {count}; methods at the vision and projector sites take several "
                "(vtp-export --list-methods)"
            )

    def _encode(
        self, prompt: str | None, messages: Messages | None, pictures: int, special: bool, timings: Timings
    ) -> Prompt:
        if (prompt is None) == (messages is None):
            raise UsageError("give either a prompt or messages, not both and not neither")
        with timings.measure("tokenize"):
            if prompt is not None:
                turns: Messages = self._prompter.messages_for(prompt, pictures)
            else:
                assert messages is not None  # by the check above
                turns = _with_images(messages, pictures, self.manifest.text.media)
            encoded = self._prompter.encode(turns, pictures, special)
        self._check_ids(encoded)
        return encoded

    def _check_ids(self, prompt: Prompt) -> None:
        """Refuse tokens that the model does not have; the image token's own place is never looked up."""
        rows, image = self.manifest.model.vocab_size, self.manifest.text.image_token_id
        if outside := next((one for one in prompt.ids if one >= rows and one != image), None):
            token = self._prompter.tokenizer.id_to_token(outside)
            raise UsageError(
                f"the prompt holds the token {token!r:.60} of id {outside}, and this model's embedding table "
                f"has {rows} rows; leave it out"
            )

    def _keep(self, wanted: int | None) -> int:
        visual = self.manifest.visual
        keep = visual.default_keep if wanted is None else wanted
        if not is_whole(keep) or keep not in visual.keep:
            held = ", ".join(map(str, visual.keep))
            raise UsageError(
                f"keep_tokens {shown(wanted)} is not in this bundle, which holds {held}; "
                "choose one of them, or export with --keep-tokens"
            )
        return int(keep)

    def _keep_within(self, budget_ms: float, keep_tokens: int | None) -> int:
        """The largest keep-count within a time, from what vtp-calib wrote into the manifest."""
        if keep_tokens is not None:
            raise UsageError("give either keep_tokens or budget_ms, not both")
        if not (is_number(budget_ms) and budget_ms > 0):
            raise UsageError(f"budget_ms {shown(budget_ms)} is not a number of milliseconds above 0")
        known = self.manifest.calibration
        if known.get("engine") != self.engine:
            made = f"measured on {known['engine']}" if "engine" in known else "not calibrated"
            raise UsageError(
                f"budget_ms needs times measured on {self.engine}; this bundle is {made}; run: vtp-calib keep"
            )
        if differs := self._conditions.differs_from(known.get("conditions")):
            raise UsageError(
                f"budget_ms needs times measured under these conditions; this bundle's were not: {differs}; "
                "run: vtp-calib keep"
            )
        times = {int(keep): tried["ttft_ms"] for keep, tried in known["tried"].items()}
        within = [keep for keep, time_ms in times.items() if time_ms <= budget_ms]
        if not within:
            raise UsageError(
                f"budget_ms {budget_ms:g} is too little for every keep-count; the fastest takes "
                f"{min(times.values()):.1f} ms"
            )
        return self._keep(max(within))

    @cached_property
    def _conditions(self) -> Conditions:
        """What times measured here depend on; looked up at the first request with a budget."""
        return conditions(self.engine, self._threads)

    def _check_room(self, request: Request) -> None:
        """Refuse a prompt that leaves no room for an answer, before anything runs."""
        pictures, text = len(request.pictures), request.prompt.text_tokens
        visual = pictures * self.manifest.visual.count
        room = self.manifest.model.max_length - visual - 1
        if text > room:
            beside = f"{visual} visual tokens" + (f" of {pictures} pictures" if pictures > 1 else "")
            fewer = ", give fewer pictures" if pictures > 1 else ""
            raise VtpError(
                f"the prompt has {text} tokens; beside {beside} this bundle has room for {max(room, 0)}; "
                f"shorten it{fewer}, or export with a larger --max-length"
            )

    @contextmanager
    def _claimed(self) -> Iterator[StageRunner]:
        """The stages, for one generation alone."""
        runner = self._open_runner()
        if not self._busy.acquire(blocking=False):
            raise VtpError(
                "this pipeline is busy: it serves one generation at a time; finish or cancel the open "
                "stream, or load one Pipeline per thread"
            )
        try:
            yield runner
        finally:
            self._busy.release()

    def _open_runner(self) -> StageRunner:
        if self._runner is None:
            raise VtpError("this pipeline is closed; load the bundle again")
        return self._runner


class Stream:
    """The pieces of one answer, as they become certain. Iterate it once, then read `result`."""

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        # The generator knows the answer but not this stream, so no cycle keeps an abandoned stream alive:
        # when the last reference goes, the pipeline is free.
        self._writing = _Writing(pipeline, request)
        self._pieces = self._writing.pieces()

    @property
    def result(self) -> Result:
        """The whole answer so far; complete once the iteration ended. VtpError before the first piece."""
        if self._writing.result is None:
            raise VtpError("this stream has not started; iterate it first")
        return self._writing.result

    def cancel(self) -> None:
        """End the answer before the next stage or token; safe from another thread.

        No further piece comes, and `result` holds what there is.
        """
        self._writing.request.stop_signal.cancel()

    def close(self) -> None:
        """Give the pipeline back without finishing."""
        self._pieces.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


class _Writing:
    """One answer under way, piece by piece."""

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        self.result: Result | None = None
        self.request = request
        self._pipeline = pipeline

    def pieces(self) -> Generator[str, None, None]:
        """Generate; a generator, since leaving it by any door frees the pipeline."""
        self.request.clock.go_on()
        with self._pipeline._claimed() as runner:
            yield from self._generate(runner)

    def _generate(self, runner: StageRunner) -> Iterator[str]:
        answer, stop_signal = self._pipeline._answer(self.request), self.request.stop_signal
        try:
            yield from self._write(runner, answer)
        except Interrupted as error:
            answer.interrupt(error.reason)
            self.result = answer.result
        if stop_signal.cancelled:
            answer.interrupt(CANCELLED)
        elif piece := answer.finish():
            yield piece

    def _write(self, runner: StageRunner, answer: Answer) -> Iterator[str]:
        """Every piece but what is held back to the end; `Interrupted` when the answer must end early."""
        check = self.request.stop_signal.check
        check()
        logits = self._prefill(runner, answer)
        self.result = answer.result
        while True:
            check()
            if piece := answer.add(logits):
                yield piece
            if not answer.stopped:
                self._pipeline._open_runner()
            if answer.ends(runner.room()):
                return
            check()
            logits = runner.step(self.request.keep, answer.token, answer.position)
            answer.position += 1

    def _prefill(self, runner: StageRunner, answer: Answer) -> np.ndarray:
        """Run the image and prompt stages; returns the first logits [V]."""
        request = self.request
        pixels = request.pictures.pixels
        seen = self._pipeline._images.find(pixels)
        check = request.stop_signal.check
        values = runner.prefill_rows(request.keep, pixels, [request.row], request.timings, seen, check)
        kept = values["keep_indices"].numpy() if "keep_indices" in values else None
        answer.begin(kept, int(values["next_position"].numpy()[0]))
        return values["logits"].numpy()[0, 0]


def _with_images(messages: Messages, pictures: int, media: str) -> Messages:
    """Put the pictures before the first user turn's words where no turn says where they belong.

    `media` says what messages call them: "image" or "video".
    """
    if not isinstance(messages, Sequence) or not all(isinstance(turn, dict) for turn in messages):
        return messages  # malformed: the prompter says how
    contents = [turn.get("content") for turn in messages]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    if any(isinstance(part, dict) and part.get("type") == media for part in parts):
        return messages
    turns = [dict(turn) for turn in messages]
    for turn in turns:
        if turn.get("role") == "user":
            content = turn.get("content")
            words = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if isinstance(words, list | tuple):  # anything else is malformed, as above
                turn["content"] = [*({"type": media} for _ in range(pictures)), *words]
            break
    return turns


def _later(seed: int | None, place: int) -> int | None:
    """The seed of prompt number `place`; what is no seed is for the sampler to refuse."""
    return int(seed) + place if seed is not None and is_whole(seed) else seed
